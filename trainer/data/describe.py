"""`spresso data`: describes a set in a few lines, and decodes some of its samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.data.audio import sound_mark, write_audio
from trainer.data.shard_set import ShardSet
from trainer.file_names import printable

_MARK = "spresso data --play-to"
"""The mark in the sounds that are written, by which they are known and may be replaced."""
_ROWS, _WIDTH = 12, 40  # of the histogram, in lines and characters
_DESCRIBED = 400  # samples whose metadata is read
_AT_ONCE = 1 << 20  # rows of the index that are counted at once


def describe(shard_set: ShardSet, *, captions: int = 5) -> str:
    """Return a set's size, lengths, sources and some captions, as lines of text.

    Only the metadata of some samples is read, so that even a large set is described in seconds. These samples are
    spread evenly over a local set. In a remote set they are the first ones, so that few shards are fetched.
    """
    info, seconds_a_frame = shard_set.info, shard_set.info.hop / shard_set.info.sample_rate
    sizes = [size for _, size in shard_set.shards]
    facts = {
        "set": shard_set.location,
        "samples": f"{len(shard_set):,}, {shard_set.total_frames * seconds_a_frame / 3600:,.2f} h",
        "shards": f"{len(sizes):,}, {_bytes(sum(sizes))}, {_bytes(min(sizes))} to {_bytes(max(sizes))} each",
        "latents": f"{info.latent_channels} channels at {1 / seconds_a_frame:g} Hz, float16, of {info.sample_rate} Hz"
        + (", with their audio" if shard_set.has_audio else ""),
        **({"text": _text(shard_set)} if shard_set.has_text else {}),
        "AudioAE": f"{info.ae_options.get('kind', 'unknown')}, {info.ae_identity[:16]}",
        "fingerprint": shard_set.fingerprint[:16],
    }
    lines = [f"{name:<12}{text}" for name, text in facts.items()]
    lines += ["", "lengths", *_histogram(shard_set, seconds_a_frame)]
    candidates = len(shard_set) if shard_set.cache is None else min(len(shard_set), _DESCRIBED)
    metadata = [shard_set.metadata(int(id_)) for id_ in _spread(candidates, _DESCRIBED)]
    lines += ["", *_sources(metadata, complete=len(metadata) == len(shard_set))]
    shown = [metadata[int(index)] for index in _spread(len(metadata), captions)]
    lines += ["", "captions", *(f"  {printable(str(entry.get('caption') or '(none)'))}" for entry in shown)]
    return "\n".join(lines)


def play_to(shard_set: ShardSet, folder: Path, *, samples: int) -> Iterator[Path]:
    """Decode `samples` samples, spread evenly over the set, to wav files; yields each path once it is written.

    Raises:
        ValueError: the autoencoder is unknown or has changed, or a file is in the way that was not written so.
    """
    from models.backbones.pretrained import load_autoencoder

    info = shard_set.info
    if "kind" not in info.ae_options:
        raise ValueError(f"{shard_set.location} does not name its autoencoder: run `spresso index` with --autoencoder")
    autoencoder = load_autoencoder(**info.ae_options)
    if autoencoder.identity() != info.ae_identity:
        raise ValueError(
            f"the autoencoder {info.ae_options} has changed since it made {shard_set.location}: restore its weights"
        )
    paths = _sound_paths(shard_set, folder, _spread(len(shard_set), samples).tolist())
    for path in paths.values():
        if path.exists() and not sound_mark(path).startswith(_MARK):
            raise ValueError(f"{path} was not written by `{_MARK}`, so it is kept: give another folder")
    for id_, path in paths.items():
        x0_CT = torch.from_numpy(shard_set.latents([id_])[0]).float()
        with torch.inference_mode():
            audio = autoencoder.decode(x0_CT[None])[0].clamp(-1, 1)
        folder.mkdir(parents=True, exist_ok=True)
        write_audio(path, audio.numpy(), info.sample_rate, mark=_MARK)
        yield path


def _sound_paths(shard_set: ShardSet, folder: Path, ids: list[int]) -> dict[int, Path]:
    """Return the file of each sample: its key without folders, and its number if an earlier sample has that name."""
    paths: dict[int, Path] = {}
    for id_ in ids:
        number = f"{id_:08d}"
        name = Path(str(shard_set.metadata(id_).get("key") or number)).name
        path = folder / f"{name}.wav"
        paths[id_] = path if path not in paths.values() else folder / f"{name}.{number}.wav"
    return paths


def _spread(size: int, count: int) -> NDArray[np.int64]:
    """Return up to `count` evenly spaced indices of 0 … size - 1."""
    return np.unique(np.linspace(0, size - 1, min(size, count)).round().astype(np.int64))


def _histogram(shard_set: ShardSet, seconds_a_frame: float) -> list[str]:
    shortest, longest = shard_set.shortest_frames, shard_set.longest_frames
    if shortest == longest:
        return [f"  all {shortest * seconds_a_frame:.2f} s"]
    rows = min(_ROWS, longest - shortest + 1)
    edges = np.linspace(shortest, longest, rows + 1)
    counts = np.zeros(rows, np.int64)
    for start in range(0, len(shard_set), _AT_ONCE):
        counts += np.histogram(shard_set.index["frames"][start : start + _AT_ONCE], edges)[0]
    return [
        f"  {low * seconds_a_frame:6.2f} to {high * seconds_a_frame:6.2f} s  {count:>10,}  "
        + "█" * round(_WIDTH * count / counts.max())
        for low, high, count in zip(edges[:-1], edges[1:], counts.tolist(), strict=True)
    ]


def _sources(metadata: list[dict[str, Any]], *, complete: bool) -> list[str]:
    names = {str(entry["source"]) for entry in metadata if entry.get("source")}
    if not names:
        return ["sources     the metadata does not name any"]
    folders = Counter(name.rpartition("/")[0] or "." for name in names)
    summary = f"{len(names):,} files in {len(folders)} folder(s)"
    head = summary if complete else f"{summary} among {len(metadata)} samples"
    return [f"sources     {head}", *(f"  {count:>6,}  {printable(folder)}" for folder, count in folders.most_common(5))]


def _text(shard_set: ShardSet) -> str:
    facts, tokens = shard_set.info.text or {}, shard_set.index["text_tokens"]
    without = np.count_nonzero(tokens == 0)
    size = f"{tokens.mean():.1f} tokens of {facts['width']} features per caption, up to {facts['tokens']}"
    return f"{size}, by {facts['encoder'][:16]}" + (f"; {without:,} samples without text" if without else "")


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"
