"""One sound file after another, cut into clips of latents, by as many processes as there are."""

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
from trainer.data.sound_files import SoundFile
from trainer.data.text_embeddings import Embedder
from trainer.data.workers import explained_death, follow_parent

SHORTEST_SECONDS = 0.01
_CLIPS_AT_ONCE = 8
_AHEAD = 2  # files under way for each worker


class AudioEncoder(Protocol):
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
class Clip:
    """A sample of a set, as `ShardWriter.write` takes it."""

    key: str
    x0: NDArray[np.float16]
    metadata: dict[str, Any]
    flac: bytes
    text: NDArray[np.float16] | None = None


@dataclass(frozen=True)
class EncodedFile:
    """What came of a file."""

    seconds: float
    """Of sound in it; 0 if it can't be used."""
    clips: list[Clip]
    problems: list[str]
    """Why it, or clips of it, were left out."""


def clip_starts(samples: int, clip_samples: int) -> list[int]:
    """Where the clips of a file begin: end to end; the rest, if it is half a clip or more, is one that ends with it."""
    if samples <= clip_samples:
        return [0]
    starts = list(range(0, samples - clip_samples + 1, clip_samples))
    if 2 * (samples - starts[-1] - clip_samples) >= clip_samples:
        starts.append(samples - clip_samples)
    return starts


class ClipEncoder:
    """Makes clips of `clip_samples` of a file; a file shorter than that is repeated."""

    def __init__(self, ae: AudioEncoder, clip_samples: int, embedder: Embedder | None = None):
        self.ae, self.clip_samples, self.embedder = ae, clip_samples, embedder

    def __call__(self, source: SoundFile, keep_audio: bool) -> EncodedFile:
        """All clips of a file, with their (levelled) audio or without."""
        try:
            audio_CS = self._read(source)
        except ValueError as error:
            return EncodedFile(0.0, [], [str(error).removeprefix(f"{source.path} ")])
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
        """A file's text, and what is wrong with it: it has none then, and its sound is used all the same."""
        if self.embedder is None:
            return None, []
        try:
            return self.embedder.embed(source.name, source.caption), []
        except ValueError as error:
            return np.zeros((0, self.embedder.width), np.float16), [str(error)]

    def _read(self, source: SoundFile) -> Tensor:
        rate = self.ae.sample_rate
        audio = torch.from_numpy(read_audio(source.path, sample_rate=rate, channels=self.ae.channels))
        if audio.shape[1] < SHORTEST_SECONDS * rate:
            raise ValueError(f"is too short: {audio.shape[1] / rate:.5f} s")
        if is_silent(audio):
            raise ValueError("is silent")
        return audio

    def _clips(
        self, source: SoundFile, audio_CS: Tensor, starts: dict[int, int], left_out: Counter[str], keep_audio: bool
    ) -> Iterator[Clip]:
        """The clips of these numbers and starts; those that can't be used are counted."""
        rate = self.ae.sample_rate
        sounding = {number: cut for number, start in starts.items() if not is_silent(cut := self._cut(audio_CS, start))}
        left_out["is silent"] += len(starts) - len(sounding)
        if not sounding:
            return
        levelled, gains = zip(*map(level, sounding.values()), strict=True)
        with torch.inference_mode():
            latents = self.ae.encode(torch.stack(levelled)).to(torch.float16).cpu().numpy()
        for number, clip_CS, gain_db, x0_CT in zip(sounding, levelled, gains, latents, strict=True):
            if not np.isfinite(x0_CT).all():
                left_out["has latents beyond the range of float16"] += 1
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
    """`encode` each task, here or in so many worker processes; the outcomes are the same and in the tasks' order.

    Raises:
        ValueError: a worker died.
    """
    if workers == 1:
        with _one_thread():
            for task in tasks:
                yield encode(*task)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # torch is imported once, not by each worker
    pool = ProcessPoolExecutor(workers, context, _start_worker, (make_ae, make_embedder, encode.clip_samples))
    under_way: deque[Future[EncodedFile]] = deque()
    try:
        with explained_death():
            while True:
                for task in islice(tasks, _AHEAD * workers - len(under_way)):
                    under_way.append(pool.submit(_encode_in_worker, *task))
                if not under_way:
                    return
                yield under_way.popleft().result()
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


_worker_encode: ClipEncoder


def _start_worker(
    make_ae: Callable[[], AudioEncoder], make_embedder: Callable[[], Embedder] | None, clip_samples: int
) -> None:
    global _worker_encode
    follow_parent()
    torch.set_num_threads(1)
    _worker_encode = ClipEncoder(make_ae(), clip_samples, make_embedder and make_embedder())


def _encode_in_worker(source: SoundFile, keep_audio: bool) -> EncodedFile:
    return _worker_encode(source, keep_audio)
