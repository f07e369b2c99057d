"""A set at a glance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.data.audio import write_audio
from trainer.data.shard_set import ShardSet

_ROWS = 12  # of the histogram
_WIDTH = 40
_LOOKED_AT = 400  # samples whose metadata is read
_AT_ONCE = 1 << 20  # rows of the index


def describe(shard_set: ShardSet, *, captions: int = 5) -> str:
    """Size, lengths, sources and some captions, as lines of text.

    Metadata is read of some samples only, so that a large set is described in seconds. They are spread evenly, but in
    a set that lies elsewhere they are the first ones, so that few shards are fetched.
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
    among = len(shard_set) if shard_set.cache is None else min(len(shard_set), _LOOKED_AT)
    described = [shard_set.metadata(int(id_)) for id_ in _spread(among, _LOOKED_AT)]
    lines += ["", *_sources(described, all_of_them=len(described) == len(shard_set))]
    shown = [described[int(place)] for place in _spread(len(described), captions)]
    lines += ["", "captions", *(f"  {metadata.get('caption') or '(none)'}" for metadata in shown)]
    return "\n".join(lines)


def play_to(shard_set: ShardSet, folder: Path, *, samples: int) -> Iterator[Path]:
    """Decode some samples, spread evenly, to wav files; yields each when it is there."""
    from models.backbones.pretrained import load_autoencoder

    info = shard_set.info
    if "kind" not in info.ae_options:
        raise ValueError(f"{shard_set.location} does not say how to get its autoencoder: index it with --autoencoder")
    autoencoder = load_autoencoder(**info.ae_options)
    if autoencoder.identity() != info.ae_identity:
        raise ValueError(
            f"the autoencoder {info.ae_options} is another one now than {shard_set.location} was made with"
        )
    for id_ in _spread(len(shard_set), samples).tolist():
        x0_CT = torch.from_numpy(shard_set.latents([id_])[0]).float()
        with torch.inference_mode():
            audio = autoencoder.decode(x0_CT[None])[0].clamp(-1, 1)
        key = Path(str(shard_set.metadata(id_).get("key") or f"{id_:08d}")).name
        path = folder / f"{key}.wav"
        folder.mkdir(parents=True, exist_ok=True)
        write_audio(path, audio.numpy(), info.sample_rate)
        yield path


def _spread(size: int, count: int) -> NDArray[np.int64]:
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


def _sources(described: list[dict[str, Any]], *, all_of_them: bool) -> list[str]:
    names = {str(metadata["source"]) for metadata in described if metadata.get("source")}
    if not names:
        return ["sources     not told of in the metadata"]
    folders = Counter(name.rpartition("/")[0] or "." for name in names)
    several = f"{len(names):,} files in {len(folders)} folder(s)"
    head = several if all_of_them else f"{several} among {len(described)} samples looked at"
    return [f"sources     {head}", *(f"  {count:>6,}  {folder}" for folder, count in folders.most_common(5))]


def _text(shard_set: ShardSet) -> str:
    facts, tokens = shard_set.info.text or {}, shard_set.index["text_tokens"]
    without = np.count_nonzero(tokens == 0)
    size = f"{tokens.mean():.1f} tokens of {facts['width']} a caption, up to {facts['tokens']}"
    return f"{size}, by {facts['encoder'][:16]}" + (f"; {without:,} samples without" if without else "")


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"
