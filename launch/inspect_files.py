"""Inspects latents and checkpoints on a disk: `spresso index`, `data` and `checkpoint`."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path

from launch import owner
from trainer.data.remote import is_url
from trainer.data.shard_set import ShardSet, open_set
from trainer.data.shards import SetInfo
from trainer.file_names import printable, printable_lines
from trainer.progress import Progress


def index(location: str, *, kind: str | None, weights: Path | None, workers: int) -> None:
    """Build the index of a folder of tar files, or of its train/ and test/, so that it becomes a set.

    Args:
        location: the folder.
        kind: autoencoder that made the latents; None: the one that the existing index names.
        weights: folder of the autoencoder's weights.
        workers: number of processes.

    Raises:
        ValueError: the autoencoder is unknown, a tar file does not fit, or another process writes into the folder.
    """
    parts = [Path(part) for part in _parts(location)]
    with ExitStack() as owned:
        for folder in dict.fromkeys([Path(location), *parts]):  # `prepare` owns the folder of both parts
            if not folder.is_dir():
                raise ValueError(f"{folder} is not a folder: give one that holds tars of latents")
            owned.enter_context(owner.holding(folder))
        for part in parts:
            _index(part, kind=kind, weights=weights, workers=workers)


def _index(folder: Path, *, kind: str | None, weights: Path | None, workers: int) -> None:
    from models.backbones.pretrained import AUTOENCODERS, load_autoencoder
    from trainer.data.index import index_folder, require_own_index
    from trainer.data.set_description import info_of

    require_own_index(folder)
    info = info_of(folder)
    if kind is not None:
        ae = load_autoencoder(kind, weights)
        options = {"kind": kind, "folder": None if weights is None else str(weights)}
        info = SetInfo(ae.identity(), options, ae.sample_rate, ae.hop, ae.latent_channels, clip_seconds=0.0)
    if info is None:
        raise ValueError(
            f"{folder} names no autoencoder of its latents: add --autoencoder, one of {', '.join(AUTOENCODERS)}"
        )
    with Progress("index", total=0, unit="shards") as progress:
        shard_set = index_folder(
            folder, info, workers=workers, progress=lambda done, total: progress.to(done, of=total)
        )
    print(f"{printable(str(folder))}: {len(shard_set)} samples in {len(shard_set.paths)} shards", file=sys.stderr)


def verify(location: str, *, workers: int) -> None:
    """Compare the tar files of a set, or of a folder's train/ and test/, with their index.

    Raises:
        ValueError: the message has a line for every problem.
    """
    from trainer.data.index import verify_folder

    problems = []
    for folder in map(Path, _parts(location)):
        with Progress("verify", total=0, unit="shards") as progress:
            found = verify_folder(folder, workers=workers, progress=lambda done, total: progress.to(done, of=total))
        if not found:
            shard_set = ShardSet(folder)
            summary = f"{folder}: {len(shard_set)} samples in {len(shard_set.paths)} shards, all match the index"
            print(printable(summary), file=sys.stderr)
        problems += found
    if problems:
        raise ValueError("\n".join(problems))


def describe(location: str, *, samples: int, play_to: Path | None) -> None:
    """Print a summary of a set, or of the train/ and test/ of a folder; decode `samples` of each to `play_to`."""
    from trainer.data import describe as description

    for number, part in enumerate(_parts(location)):
        shard_set = open_set(part)
        print(("\n" if number else "") + printable_lines(description.describe(shard_set)))
        if play_to is not None:
            for path in description.play_to(shard_set, play_to, samples=samples):
                print(printable(str(path)), file=sys.stderr)


def checkpoint(folder: Path, *, verify: bool) -> int:
    """List the checkpoints of a run, or describe one; `verify`: compare with checksums, return 1 if one is damaged."""
    from trainer.checkpoints import inventory

    paths = inventory.find_checkpoints(folder)
    if verify:
        outcomes = [inventory.verification(path) for path in paths]
        print(printable_lines("\n".join(text for text, _ in outcomes)))
        return 0 if all(whole for _, whole in outcomes) else 1
    text = inventory.explanation(folder) if paths == [folder] else inventory.listing(paths)
    print(printable_lines(text))
    return 0


def _parts(location: str) -> list[str]:
    """Return the train/ and test/ of a folder or URL of latents; the location itself if it is a set."""
    location = location.rstrip("/")
    parts = [f"{location}/{split}" for split in ("train", "test")]
    if is_url(location):
        return [location] if location.endswith(("/train", "/test")) else parts
    return [part for part in parts if Path(part).is_dir()] or [location]
