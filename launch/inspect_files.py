"""What lies on a disk: `spresso index`, `data` and `checkpoint`."""

from __future__ import annotations

import sys
from pathlib import Path

from trainer.data.remote import is_url
from trainer.data.shard_set import ShardSet, open_set
from trainer.data.shards import SetInfo
from trainer.progress import Progress


def index(location: str, *, kind: str | None, weights: Path | None, workers: int) -> None:
    """Make a folder of tars a set, or the train/ and test/ of a folder two."""
    for part in _parts(location):
        _index(Path(part), kind=kind, weights=weights, workers=workers)


def _index(folder: Path, *, kind: str | None, weights: Path | None, workers: int) -> None:
    from models.backbones.pretrained import load_autoencoder
    from trainer.data.index import index_folder, info_of

    info = info_of(folder)
    if kind is not None:
        ae = load_autoencoder(kind, weights)
        options = {"kind": kind, "folder": None if weights is None else str(weights)}
        info = SetInfo(ae.identity(), options, ae.sample_rate, ae.hop, ae.latent_channels, clip_seconds=0.0)
    if info is None:
        raise ValueError(f"whose latents {folder} holds is not known: say --autoencoder spectral, woosh or oobleck")
    with Progress("index", total=0, unit="shards") as progress:
        shard_set = index_folder(
            folder, info, workers=workers, progress=lambda done, total: progress.to(done, of=total)
        )
    print(f"{folder}: {len(shard_set)} samples in {len(shard_set.paths)} shards", file=sys.stderr)


def verify(location: str, *, workers: int) -> None:
    """Hold the tars of a set, or of a folder's train/ and test/, against their index.

    Raises:
        ValueError: names all that is wrong.
    """
    from trainer.data.index import verify_folder

    problems = []
    for folder in map(Path, _parts(location)):
        with Progress("verify", total=0, unit="shards") as progress:
            found = verify_folder(folder, workers=workers, progress=lambda done, total: progress.to(done, of=total))
        if not found:
            shard_set = ShardSet(folder)
            say = f"{folder}: {len(shard_set)} samples in {len(shard_set.paths)} shards, all as indexed"
            print(say, file=sys.stderr)
        problems += found
    if problems:
        raise ValueError("\n".join(problems))


def describe(location: str, *, samples: int, play_to: Path | None) -> None:
    """Describe a set, or the train/ and test/ of a folder of latents; decode some samples of each."""
    from trainer.data import describe as description

    for number, part in enumerate(_parts(location)):
        shard_set = open_set(part)
        print(("\n" if number else "") + description.describe(shard_set))
        if play_to is not None:
            for path in description.play_to(shard_set, play_to, samples=samples):
                print(path, file=sys.stderr)


def checkpoint(folder: Path, *, verify: bool) -> int:
    """List the checkpoints of a run, or explain one; with `verify` read all of each, and return 1 if one is damaged."""
    from trainer.checkpoints import inventory

    paths = inventory.find_checkpoints(folder)
    if verify:
        outcomes = [inventory.verification(path) for path in paths]
        print("\n".join(text for text, _ in outcomes))
        return 0 if all(whole for _, whole in outcomes) else 1
    print(inventory.explanation(folder) if paths == [folder] else inventory.listing(paths))
    return 0


def _parts(location: str) -> list[str]:
    """The sets of a folder of latents or of its URL; itself where it is one."""
    location = location.rstrip("/")
    parts = [f"{location}/{split}" for split in ("train", "test")]
    if is_url(location):
        return [location] if location.endswith(("/train", "/test")) else parts
    return [part for part in parts if Path(part).is_dir()] or [location]
