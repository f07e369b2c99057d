"""Cuts sound files into clips and encodes the clips to latents, in one or more processes."""

from __future__ import annotations

import multiprocessing
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.loudness import is_silent, level
from trainer.data.audio import encode_audio, read_audio
from trainer.data.find_sounds import refuse_unreadable
from trainer.data.sound_files import SoundFile
from trainer.data.text_embeddings import Embedder
from trainer.data.workers import exit_with_parent, explain_dead_workers
from trainer.file_names import as_unicode

SHORTEST_SECONDS = 0.01
_CLIPS_AT_ONCE = 8
_AHEAD = 2  # files queued per worker


class AudioEncoder(Protocol):
    """The part of `AudioAE` that `prepare` needs."""

    sample_rate: int
    channels: int
    latent_channels: int
    hop: int

    def encode(self, audio: Tensor) -> Tensor:
        """Encode audio (B, channels, samples) to latents (B, C, T)."""

    def frames(self, samples: int) -> int:
        """Return T, the number of frames for `samples` audio samples."""

    def identity(self) -> str:
        """Return a hash of everything that the latents depend on."""


@dataclass(frozen=True)
class Clip:
    """A sample of a set; the fields are the arguments of `ShardWriter.write`."""

    key: str
    x0: NDArray[np.float16]
    metadata: dict[str, Any]
    flac: bytes
    text: NDArray[np.float16] | None = None


@dataclass(frozen=True)
class EncodedFile:
    """The clips of a sound file."""

    seconds: float
    """Seconds of sound in the file; 0 if the file can't be used."""
    clips: list[Clip]
    problems: list[str]
    """The reasons why the file, clips of it or its text were left out."""


def clip_starts(samples: int, clip_samples: int) -> list[int]:
    """Return the first sample of each clip of a file.

    Clips follow one another without gaps. If the remainder is at least half a clip, one more clip ends with the file.
    """
    if samples <= clip_samples:
        return [0]
    starts = list(range(0, samples - clip_samples + 1, clip_samples))
    if 2 * (samples - starts[-1] - clip_samples) >= clip_samples:
        starts.append(samples - clip_samples)
    return starts


class ClipEncoder:
    """Cuts a file into clips of `clip_samples` and encodes them; a file that is shorter than a clip is repeated."""

    def __init__(self, ae: AudioEncoder, clip_samples: int, embedder: Embedder | None = None):
        self.ae, self.clip_samples, self.embedder = ae, clip_samples, embedder

    def __call__(self, source: SoundFile, keep_audio: bool) -> EncodedFile:
        """Return all clips of a file; with `keep_audio`, each clip has its audio at the normalized level."""
        try:
            audio_CS = self._read(source)
        except ValueError as error:
            return EncodedFile(0.0, [], [as_unicode(str(error).removeprefix(f"{source.path} "))])
        text_NE, text_problems = self._text(source)
        starts = clip_starts(audio_CS.shape[1], self.clip_samples)
        clips: list[Clip] = []
        left_out: Counter[str] = Counter()
        for first in range(0, len(starts), _CLIPS_AT_ONCE):
            numbers = range(first, min(first + _CLIPS_AT_ONCE, len(starts)))
            made = self._clips(source, audio_CS, {n: starts[n] for n in numbers}, left_out, keep_audio)
            clips += [replace(clip, text=text_NE) for clip in made]
        problems = text_problems + [
            f"{problem} in {count} of {len(starts)} clips" for problem, count in left_out.items() if count
        ]
        return EncodedFile(audio_CS.shape[1] / self.ae.sample_rate, clips, problems)

    def _text(self, source: SoundFile) -> tuple[NDArray[np.float16] | None, list[str]]:
        """Return a file's text and its problems. A file whose text has a problem is used without text."""
        if self.embedder is None:
            return None, []
        try:
            return self.embedder.embed(source.name, source.caption), []
        except ValueError as error:
            return np.zeros((0, self.embedder.width), np.float16), [str(error)]

    def _read(self, source: SoundFile) -> Tensor:
        rate = self.ae.sample_rate
        refuse_unreadable(source.path)
        audio = torch.from_numpy(read_audio(source.path, sample_rate=rate, channels=self.ae.channels))
        if audio.shape[1] < SHORTEST_SECONDS * rate:
            raise ValueError(f"is too short: {audio.shape[1] / rate:.5f} s")
        if is_silent(audio):
            raise ValueError("is silent")
        return audio

    def _clips(
        self, source: SoundFile, audio_CS: Tensor, starts: dict[int, int], left_out: Counter[str], keep_audio: bool
    ) -> Iterator[Clip]:
        """Yield the clips with these numbers and starts; unusable clips are counted in `left_out` by their problem."""
        rate = self.ae.sample_rate
        sounding = {number: cut for number, start in starts.items() if not is_silent(cut := self._cut(audio_CS, start))}
        left_out["is silent"] += len(starts) - len(sounding)
        if not sounding:
            return
        # Encode all clips that are not silent in one batch.
        levelled, gains = zip(*map(level, sounding.values()), strict=True)
        with torch.inference_mode():
            latents = self.ae.encode(torch.stack(levelled)).to(torch.float16).cpu().numpy()
        for number, clip_CS, gain_db, x0_CT in zip(sounding, levelled, gains, latents, strict=True):
            if not np.isfinite(x0_CT).all():
                left_out["has latents that exceed the range of float16"] += 1
                continue
            key = f"{source.key}-{number:04d}"
            metadata = {
                "key": key,
                "caption": source.caption,
                "source": source.name,
                "start": starts[number] / rate,
                "seconds": min(audio_CS.shape[1], self.clip_samples) / rate,
                "sample_rate": rate,
                "gain_db": gain_db,
            } | ({"facts": dict(source.facts)} if source.facts else {})
            flac = encode_audio(clip_CS.numpy(), rate, suffix=".flac") if keep_audio else b""
            yield Clip(key, x0_CT, metadata, flac)

    def _cut(self, audio_CS: Tensor, start: int) -> Tensor:
        cut_CS = audio_CS[:, start : start + self.clip_samples]
        return cut_CS.repeat(1, -(-self.clip_samples // cut_CS.shape[1]))[:, : self.clip_samples]


def encode_in_order(
    tasks: Iterator[tuple[SoundFile, bool]],
    encode: ClipEncoder,
    make_ae: Callable[[], AudioEncoder],
    make_embedder: Callable[[], Embedder] | None = None,
    *,
    workers: int,
) -> Generator[EncodedFile]:
    """Yield `encode(*task)` for each task, in their order, computed in this process (1 worker) or in worker processes.

    The results do not depend on the number of workers.

    Raises:
        ValueError: a worker died.
    """
    if workers == 1:
        with _single_thread():
            for task in tasks:
                yield encode(*task)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # import torch once, not in each worker
    pool = ProcessPoolExecutor(workers, context, _start_worker, (make_ae, make_embedder, encode.clip_samples))
    pending: deque[Future[EncodedFile]] = deque()
    try:
        with explain_dead_workers():
            while True:
                for task in islice(tasks, _AHEAD * workers - len(pending)):
                    pending.append(pool.submit(_encode_in_worker, *task))
                if not pending:
                    return
                yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _single_thread() -> Iterator[None]:
    """Use one thread, as a worker does; another number of threads would round sums differently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


_worker_encode: ClipEncoder


def _start_worker(
    make_ae: Callable[[], AudioEncoder], make_embedder: Callable[[], Embedder] | None, clip_samples: int
) -> None:
    global _worker_encode
    exit_with_parent()
    torch.set_num_threads(1)
    _worker_encode = ClipEncoder(make_ae(), clip_samples, make_embedder and make_embedder())


def _encode_in_worker(source: SoundFile, keep_audio: bool) -> EncodedFile:
    return _worker_encode(source, keep_audio)
