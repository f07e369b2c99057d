"""From a folder of sound files to sets of latents: `OUT/train` to learn from and `OUT/test`, which nothing learns from.

The work is planned before it begins: files in the order of their paths, cut into units that fill about a shard each.
What a unit's shards hold depends on its files alone, so the outcome is the same to the byte for any number of workers
and however often it was killed. `OUT/.prepare` remembers the units that are done until all of them are.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.data.audio import duration, encode_audio, is_silent, level, read_audio
from trainer.data.files import replacing, write_whole
from trainer.data.shards import SetInfo, ShardWriter, scan_shard, write_index
from trainer.data.sources import Source, held_out, list_sources

_SPLITS = ("train", "test")
_SHORTEST_SECONDS = 0.01
_CLIPS_AT_ONCE = 8
_AHEAD = 2  # files under way for each worker
_SAMPLE_OVERHEAD = 4096  # bytes, more than a sample's JSON and tar headers take


class Encoder(Protocol):
    """What is needed of an `AudioAE`."""

    sample_rate: int
    channels: int
    latent_channels: int
    hop: int

    def encode(self, audio: Tensor) -> Tensor:
        """(B, channels, samples) → (B, C, T)."""

    def frames(self, samples: int) -> int:
        """T for so many samples."""

    def identity(self) -> str:
        """A hash of all that the latents depend on."""


@dataclass(frozen=True)
class PrepareReport:
    """What came of a folder."""

    settings: dict[str, Any]
    """All that the outcome depends on."""
    files: int
    """Sound files that were found."""
    clips: dict[str, int]
    """Clips in each set."""
    seconds: float
    """Of sound that was read, silence included."""
    problems: list[dict[str, str]]
    """{"file", "reason"} of each file that could not be used, and of each clip of a file."""


def prepare(
    audio: Path,
    out: Path,
    make_ae: Callable[[], Encoder],
    *,
    clip_seconds: float,
    holdout: float,
    seed: int,
    ae_options: Mapping[str, Any] | None = None,
    workers: int = 1,
    shard_mb: float = 64,
    progress: Callable[[int, int, float], None] | None = None,
) -> PrepareReport:
    """Make the sets, or what is missing of them; where they are complete, return at once.

    Files are cut into clips of equal length. A shorter one is repeated to fill it; the rest of a longer one is a clip
    that ends with the file, if it is at least half a clip. Each clip is brought to a common level, and its gain kept.
    Silence and files that can't be read are left out and reported (`OUT/report.json`).

    Args:
        audio: the folder of sound files.
        out: the folder for the sets.
        make_ae: makes the autoencoder, in this process and in each worker; it must be picklable.
        clip_seconds: a clip's length.
        holdout: fraction of the files (by a hash of their base names) for the test set, 0 up to but not 1. The test
            set holds the clips' audio as well.
        seed: of that choice.
        ae_options: the config that makes the autoencoder again, to be kept in the sets' `set.json`.
        workers: processes; with 1, this one.
        shard_mb: a shard's size, at most, in MiB (more only if a single clip is larger).
        progress: is called after each file with files done, files in all, and seconds of sound read.

    Raises:
        ValueError: there is no usable sound, a set would be empty, `out` holds other sets, or a worker died.
    """
    if not 0 <= holdout < 1:
        raise ValueError(f"holdout is a fraction from 0 up to but not 1, not {holdout}")
    ae = make_ae()
    clip_samples = round(clip_seconds * ae.sample_rate)
    if clip_samples < _SHORTEST_SECONDS * ae.sample_rate or workers < 1:
        raise ValueError(f"clip_seconds is at least {_SHORTEST_SECONDS} and workers 1, not {clip_seconds}, {workers}")
    sources = list_sources(audio)
    settings = {
        "ae": ae.identity(),
        "clip_seconds": clip_seconds,
        "holdout": holdout,
        "seed": seed,
        "shard_mb": shard_mb,
        "files": _fingerprint(sources),
    }
    if report := _finished(out, settings):
        return report
    _begin(out, settings)
    units = _plan(sources, ae, clip_samples, holdout=holdout, seed=seed, shard_bytes=int(shard_mb * 2**20))
    encode = _ClipEncoder(ae, clip_samples)
    _make_units(units, out, encode, make_ae, workers=workers, shard_bytes=int(shard_mb * 2**20), progress=progress)
    info = SetInfo(
        ae_identity=ae.identity(),
        sample_rate=ae.sample_rate,
        hop=ae.hop,
        latent_channels=ae.latent_channels,
        clip_seconds=clip_seconds,
        ae_options=dict(ae_options or {}),
        prepared=settings,
    )
    return _finish(out, units, info)


def _fingerprint(sources: Iterable[Source]) -> str:
    digest = blake2b(digest_size=16)
    for source in sources:
        status = source.path.stat()
        digest.update(json.dumps([source.name, status.st_size, status.st_mtime_ns, source.caption]).encode())
    return digest.hexdigest()


# ---- What is there already ------------------------------------------------------------------------------------------


def _finished(out: Path, settings: dict[str, Any]) -> PrepareReport | None:
    """The report of a complete outcome."""
    if not (out / "report.json").is_file():
        return None
    report = PrepareReport(**json.loads((out / "report.json").read_text(encoding="utf-8")))
    if report.settings != settings:
        other = ", ".join(sorted(key for key in settings if report.settings.get(key) != settings[key]))
        raise ValueError(f"{out} was prepared with other settings ({other}): remove it, or give another folder")
    if not all((out / split / "set.json").is_file() for split in report.clips):
        return None
    shutil.rmtree(out / ".prepare", ignore_errors=True)
    return report


def _begin(out: Path, settings: dict[str, Any]) -> None:
    """Make `OUT/.prepare` ready, with what an earlier attempt with the same settings left in it."""
    work = out / ".prepare"
    mark = work / "settings.json"
    if mark.is_file() and json.loads(mark.read_text(encoding="utf-8")) == settings:
        return
    if not work.exists() and any((out / split).exists() for split in _SPLITS) and not (out / "report.json").exists():
        raise ValueError(f"{out} holds a train or test folder that `prepare` did not make: give another folder")
    for folder in (*(out / split for split in _SPLITS), work):
        shutil.rmtree(folder, ignore_errors=True)
    work.mkdir(parents=True)
    write_whole(mark, json.dumps(settings))


# ---- The plan -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Unit:
    """Files whose clips fill about a shard."""

    split: str
    number: int
    sources: list[Source]

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:05d}"


def _plan(
    sources: list[Source], ae: Encoder, clip_samples: int, *, holdout: float, seed: int, shard_bytes: int
) -> list[_Unit]:
    """Share out the files by what their headers say; those that can't be read count nothing and are found out later."""
    seconds = {source: duration(source.path) for source in sources}
    tested = held_out((source.base_name for source in sources if seconds[source]), fraction=holdout, seed=seed)
    clip_bytes = _SAMPLE_OVERHEAD + 2 * ae.latent_channels * ae.frames(clip_samples)
    audio_bytes = {"train": 0, "test": 3 * ae.channels * clip_samples}
    units = []
    for split in _SPLITS:
        number, room = -1, 0
        for source in sources:
            if (source.base_name in tested) != (split == "test"):
                continue
            clips = len(_clip_starts(round(seconds[source] * ae.sample_rate), clip_samples))
            room -= clips * (clip_bytes + audio_bytes[split])
            if room < 0 or number < 0:
                number += 1
                units.append(_Unit(split, number, []))
                room = shard_bytes - clips * (clip_bytes + audio_bytes[split])
            units[-1].sources.append(source)
    return units


def _clip_starts(samples: int, clip_samples: int) -> list[int]:
    """Where the clips of a file begin."""
    if samples <= clip_samples:
        return [0]
    starts = list(range(0, samples - clip_samples + 1, clip_samples))
    if samples - starts[-1] - clip_samples >= clip_samples / 2:
        starts.append(samples - clip_samples)
    return starts


# ---- One file -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Clip:
    key: str
    x0: NDArray[np.float16]
    metadata: dict[str, Any]
    flac: bytes


@dataclass
class _Encoded:
    """A file's clips."""

    seconds: float
    clips: list[_Clip]
    problems: list[dict[str, str]]


class _ClipEncoder:
    """Turns a file into clips."""

    def __init__(self, ae: Encoder, clip_samples: int):
        self.ae, self.clip_samples = ae, clip_samples

    def __call__(self, source: Source, keep_audio: bool) -> _Encoded:
        rate = self.ae.sample_rate
        try:
            audio = read_audio(source.path, sample_rate=rate, channels=self.ae.channels)
            if audio.shape[1] < _SHORTEST_SECONDS * rate:
                raise ValueError(f"is too short: {audio.shape[1] / rate:.5f} s")
            if is_silent(audio):
                raise ValueError("is silent")
        except ValueError as error:
            reason = str(error).removeprefix(f"{source.path} ")
            return _Encoded(0.0, [], [{"file": source.name, "reason": reason}])
        encoded = _Encoded(audio.shape[1] / rate, [], [])
        starts = list(enumerate(_clip_starts(audio.shape[1], self.clip_samples)))
        for first in range(0, len(starts), _CLIPS_AT_ONCE):
            self._encode_clips(encoded, source, audio, starts[first : first + _CLIPS_AT_ONCE], keep_audio)
        return encoded

    def _encode_clips(
        self,
        encoded: _Encoded,
        source: Source,
        audio: NDArray[np.float32],
        starts: list[tuple[int, int]],
        keep_audio: bool,
    ) -> None:
        """Add the clips that begin there."""
        rate, samples = self.ae.sample_rate, audio.shape[1]
        levelled, gains = zip(*(level(self._clip(audio, start)) for _, start in starts), strict=True)
        with torch.inference_mode():
            latents = self.ae.encode(torch.from_numpy(np.stack(levelled))).to(torch.float16).cpu().numpy()
        for (number, start), clip, gain_db, x0_CT in zip(starts, levelled, gains, latents, strict=True):
            if is_silent(clip):
                encoded.problems.append({"file": source.name, "reason": f"is silent from {start / rate:.2f} s on"})
            elif not np.isfinite(x0_CT).all():
                reason = f"has latents beyond the range of float16 from {start / rate:.2f} s on"
                encoded.problems.append({"file": source.name, "reason": reason})
            else:
                key = f"{source.key}-{number:04d}"
                metadata = {
                    "key": key,
                    "caption": source.caption,
                    "source": source.name,
                    "start": start / rate,
                    "seconds": min(samples, self.clip_samples) / rate,
                    "sample_rate": rate,
                    "gain_db": gain_db,
                }
                flac = encode_audio(clip, rate, suffix=".flac") if keep_audio else b""
                encoded.clips.append(_Clip(key, x0_CT, metadata, flac))

    def _clip(self, audio: NDArray[np.float32], start: int) -> NDArray[np.float32]:
        return np.take(audio, range(start, start + self.clip_samples), axis=1, mode="wrap")


# ---- All files, by as many processes as there are ---------------------------------------------------------------------


def _encode_in_order(
    tasks: Iterator[tuple[Source, bool]], encode: _ClipEncoder, make_ae: Callable[[], Encoder], workers: int
) -> Iterator[_Encoded]:
    if workers == 1:
        with _one_thread():
            for task in tasks:
                yield encode(*task)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start_worker, (make_ae, encode.clip_samples))
    try:
        under_way: deque[Future[_Encoded]] = deque()
        while True:
            for task in islice(tasks, _AHEAD * workers - len(under_way)):
                under_way.append(pool.submit(_encode_in_worker, *task))
            if not under_way:
                return
            yield under_way.popleft().result()
    except BrokenProcessPool as error:
        raise ValueError(
            "a worker died, perhaps for want of memory: run the same again with fewer workers, it goes on from here"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _one_thread() -> Iterator[None]:
    """As many threads as in a worker, or sums would be rounded otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


_worker_encode: _ClipEncoder


def _start_worker(make_ae: Callable[[], Encoder], clip_samples: int) -> None:
    global _worker_encode
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which stops its workers
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _worker_encode = _ClipEncoder(make_ae(), clip_samples)


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(source: Source, keep_audio: bool) -> _Encoded:
    return _worker_encode(source, keep_audio)


# ---- Units and sets ---------------------------------------------------------------------------------------------------


def _make_units(
    units: list[_Unit],
    out: Path,
    encode: _ClipEncoder,
    make_ae: Callable[[], Encoder],
    *,
    workers: int,
    shard_bytes: int,
    progress: Callable[[int, int, float], None] | None,
) -> None:
    """Make the units that aren't done."""
    total = sum(len(unit.sources) for unit in units)
    missing = [unit for unit in units if not _is_done(out, unit)]
    records = [_record(out, unit) for unit in units if unit not in missing]
    done, seconds = total - sum(len(unit.sources) for unit in missing), sum(record["seconds"] for record in records)
    tasks = ((source, unit.split == "test") for unit in missing for source in unit.sources)
    with closing(_encode_in_order(tasks, encode, make_ae, workers)) as encoded_files:
        for unit in missing:
            record: dict[str, Any] = {"shards": {}, "seconds": 0.0, "problems": []}
            with ShardWriter(out / unit.split, prefix=f"{unit.number:05d}-", max_bytes=shard_bytes) as writer:
                for encoded in islice(encoded_files, len(unit.sources)):
                    for clip in encoded.clips:
                        writer.write(clip.key, clip.x0, clip.metadata, flac=clip.flac)
