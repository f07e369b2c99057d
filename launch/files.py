"""Files in, files out: `spresso encode`, `decode`, `index`, `data` and `checkpoint`."""

from __future__ import annotations

import dataclasses
import json
import sys
from functools import partial
from pathlib import Path

import torch

from models import bitstream
from models.codec import SPresso
from trainer.data.audio import read_audio, write_audio
from trainer.data.files import write_whole
from trainer.data.remote import is_url
from trainer.data.shard_set import ShardSet, open_set
from trainer.data.shards import SetInfo
from trainer.progress import Progress


def encode(source: Path, target: Path, *, codec: Path | None, device: str, books: int | None) -> None:
    """A sound file → a stream; says what it costs."""
    spresso = _load(codec or newest_codec(), device)
    audio = torch.from_numpy(read_audio(source, sample_rate=spresso.autoencoder.sample_rate, channels=1))
    stream = spresso.encode(audio, books=books)
    content = bitstream.write(stream)
    write_whole(target, content)
    seconds = audio.shape[-1] / spresso.autoencoder.sample_rate
    print(
        f"{target}: {len(content)} bytes for {seconds:.2f} s, {spresso.kbps(stream.books):.3f} kbps "
        f"({len(content) * 8 / seconds / 1000:.3f} with its header)",
        file=sys.stderr,
    )


def decode(
    source: Path, target: Path, *, codec: Path | None, device: str, seed: int, steps: int | None, samples: int
) -> None:
    """A stream → a sound file, or several that the same codes allow."""
    if samples < 1 or (steps is not None and steps < 1):
        raise ValueError("--samples and --steps are at least 1")
    content = source.read_bytes()
    model = bitstream.model_of(content)
    spresso = _load(codec or fitting_codec(model, source), device)
    if not spresso.model_hash.startswith(model):
        raise ValueError(
            f"{source} was made by model {model}, {codec} is {spresso.model_hash[:8]}: give the one that made it"
        )
    stream = bitstream.read(content, frames_of=spresso.z_frames)
    sampling = spresso.config.sampling
    if steps is not None:
        sampling = dataclasses.replace(sampling, steps=steps)
    for number in range(samples):
        path = target if samples == 1 else target.with_suffix(f".{number}{target.suffix}")
        with Progress(f"decode {path.name}", total=1, unit="of all steps") as progress:
            show = partial(_show, progress)
            audio = spresso.decode(stream, seed=seed + number, sampling=sampling, progress=show)
        write_audio(path, audio.clamp(-1, 1).cpu().numpy(), spresso.autoencoder.sample_rate)


def _show(progress: Progress, done: int, total: int) -> None:
    progress.to(done / total)


def index(location: str, *, kind: str | None, weights: Path | None, workers: int) -> None:
    """Make a folder of tars a set, or the train/ and test/ of a folder two."""
    for part in _parts(location):
        _index(Path(part), kind=kind, weights=weights, workers=workers)


def _index(folder: Path, *, kind: str | None, weights: Path | None, workers: int) -> None:
    from models.pretrained import load_autoencoder
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
    from trainer import inventory

    paths = inventory.find(folder)
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


def newest_codec() -> Path:
    """The export that was finished last."""
    exports = [path for path in _exports() if (path / "quantizer.safetensors").exists()]
    if not exports:
        raise ValueError("there is no codec under runs/: train one with `spresso run demo`, or give --codec FOLDER")
    return max(exports, key=lambda path: (path / "codec.json").stat().st_mtime)


def fitting_codec(model: str, source: Path) -> Path:
    """The export whose model made a stream."""
    for path in _exports():
        if json.loads((path / "codec.json").read_text()).get("model", "").startswith(model):
            return path
    raise ValueError(
        f"{source} was made by model {model}, which is not under runs/: give its export with --codec FOLDER"
    )


def _exports() -> list[Path]:
    return sorted(path.parent for path in Path("runs").glob("**/export/codec.json"))


def _load(folder: Path, device: str) -> SPresso:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here; leave it out, or say --device cpu")
    spresso = SPresso.from_pretrained(folder, device=device)
    print(f"codec {folder}, model {spresso.model_hash[:8]}", file=sys.stderr)
    return spresso
