"""Cuts sound files into clips and encodes the clips to latents, in one or more processes."""

from __future__ import annotations

import multiprocessing
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.disk_errors import patiently
from models.loudness import SilenceMeter, is_silent, level
from models.resampling import Audio, resample
from trainer.data.audio import encode_audio, mixed
from trainer.data.clip_store import Clip, ClipStore
from trainer.data.contents import content_digest
from trainer.data.origins import digest_of, opened
from trainer.data.sound_reader import SoundReader
from trainer.data.sources import SoundFile
from trainer.data.text_embeddings import Embedder
from trainer.data.workers import exit_with_parent, explain_dead_workers
from trainer.file_names import as_unicode

SHORTEST_SECONDS = 0.01
_CLIPS_AT_ONCE = 8
_AHEAD = 2  # files queued per worker
_PAUSES = (0.5, 5.0)
"""Seconds to wait before a file whose disk failed is read again."""


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
class EncodedFile:
    """The clips of a sound file."""

    seconds: float
    """Seconds of sound in the file; 0 if the file can't be used."""
    clips: ClipStore
    problems: list[str]
    """What was left out, and why: the file, a part of it, clips of it or its text; or what of it had to be guessed."""
    digest: str
    """The hash of the file's bytes (`content_digest`)."""


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
    """Cuts a file into clips of `clip_samples` and encodes them; a file that is shorter than a clip is repeated.

    A file is read in blocks. The clips of a long one are kept in `spool`, a folder, until it is read to its end. So is
    the copy of a sound that is fetched from a server; a failing request is repeated for `patience` seconds.
    """

    def __init__(
        self,
        ae: AudioEncoder,
        clip_samples: int,
        embedder: Embedder | None = None,
        *,
        spool: Path | None = None,
        patience: float = 0,
    ) -> None:
        self.ae, self.clip_samples, self.embedder, self.spool = ae, clip_samples, embedder, spool
        self.patience = patience

    def __call__(self, source: SoundFile, keep_audio: bool) -> EncodedFile:
        """Return all clips of a file; with `keep_audio`, each clip has its audio at the normalized level.

        Raises:
            OSError: the disk failed several times. Such a file is not a bad one, so the work has to stop.
        """
        return patiently(lambda: self._encode(source, keep_audio), pauses=_PAUSES)

    def _encode(self, source: SoundFile, keep_audio: bool) -> EncodedFile:
        clips = ClipStore(self.spool and self.spool / f"{source.key}.clips")
        meter = SilenceMeter()
        digests = [""]
        try:
            with self._reader(source, digests) as reader:
                blocks = self._blocks(reader, meter)
                problems = self._fill(clips, source, cut_clips(blocks, self.clip_samples), keep_audio)
        except ValueError as error:
            clips.clear()
            reason = as_unicode(str(error).removeprefix(f"{source.path} "))
            return EncodedFile(0.0, clips, [reason], digests[-1] or content_digest(source.path))
        seconds = meter.samples / self.ae.sample_rate
        return EncodedFile(seconds, clips, reader.notes + problems, digests[-1] or content_digest(source.path))

    @contextmanager
    def _reader(self, source: SoundFile, digests: list[str]) -> Iterator[SoundReader]:
        """Open a sound; the hash of one that is no file of its own is added to `digests`."""
        if source.origin is None:
            with SoundReader(source.path) as reader:
                yield reader
            return
        origin, path = source.origin, source.path
        with opened(origin, path, spool=self.spool, name=source.key, patience=self.patience) as file:
            digests.append(digest_of(file))
            file.seek(0)
            with SoundReader(source.path, file) as reader:
                yield reader

    def _blocks(self, reader: SoundReader, meter: SilenceMeter) -> Iterator[Audio]:
        """Yield the sound as the autoencoder takes it, measured by `meter`, and refuse what is short or silent."""
        own = SilenceMeter()
        blocks = mixed(own.through(block.T for block in reader.blocks()), channels=self.ae.channels)
        yield from meter.through(resample(blocks, reader.rate, self.ae.sample_rate, channels=self.ae.channels))
        if meter.samples < SHORTEST_SECONDS * self.ae.sample_rate:
            raise ValueError(f"is too short: {meter.samples / self.ae.sample_rate:.5f} s")
        if own.silent:
            raise ValueError("is silent")
        if meter.silent:
            raise ValueError(
                f"is silent once its {reader.channels} channels are averaged: they cancel each other (opposite phase)"
            )

    def _text(self, source: SoundFile) -> tuple[NDArray[np.float16] | None, list[str]]:
        """Return a file's text and its problems. A file whose text has a problem is used without text."""
        if self.embedder is None:
            return None, []
        try:
            return self.embedder.embed(source.name, source.caption), []
        except ValueError as error:
            return np.zeros((0, self.embedder.width), np.float16), [str(error)]

    def _fill(
        self, clips: ClipStore, source: SoundFile, cuts: Iterator[tuple[int, Audio]], keep_audio: bool
    ) -> list[str]:
        """Encode all clips into `clips`; return the problems with them and with the text."""
        left_out: Counter[str] = Counter()
        count = 0
        text_NE: NDArray[np.float16] | None = None
        problems: list[str] = []
        while batch := list(islice(cuts, _CLIPS_AT_ONCE)):
            if not count:
                text_NE, problems = self._text(source)
            for clip in self._clips(source, count, batch, left_out, keep_audio):
                clips.append(replace(clip, text=text_NE))
            count += len(batch)
        return problems + [f"{problem} in {times} of {count} clips" for problem, times in left_out.items() if times]

    def _clips(
        self,
        source: SoundFile,
        first: int,
        cuts: list[tuple[int, Audio]],
        left_out: Counter[str],
        keep_audio: bool,
    ) -> Iterator[Clip]:
        """Yield the clips numbered from `first`; unusable clips are counted in `left_out` by their problem."""
        rate = self.ae.sample_rate
        whole = [self._whole(torch.from_numpy(cut_CS)) for _, cut_CS in cuts]
        sounding = [number for number, clip_CS in enumerate(whole) if not is_silent(clip_CS)]
        left_out["is silent"] += len(cuts) - len(sounding)
        if not sounding:
            return
        # Encode all clips that are not silent in one batch.
        levelled, gains = zip(*(level(whole[number]) for number in sounding), strict=True)
        with torch.inference_mode():
            latents = self.ae.encode(torch.stack(levelled)).to(torch.float16).cpu().numpy()
        for number, clip_CS, gain_db, x0_CT in zip(sounding, levelled, gains, latents, strict=True):
            if not np.isfinite(x0_CT).all():
                left_out["has latents that exceed the range of float16"] += 1
                continue
            start, cut_CS = cuts[number]
            key = f"{source.key}-{first + number:04d}"
            metadata = {
                "key": key,
                "caption": source.caption,
                "source": source.name,
                "start": start / rate,
                "seconds": cut_CS.shape[1] / rate,
                "sample_rate": rate,
                "gain_db": gain_db,
            } | ({"facts": dict(source.facts)} if source.facts else {})
            flac = encode_audio(clip_CS.numpy(), rate, suffix=".flac") if keep_audio else b""
            yield Clip(key, x0_CT, metadata, flac)

    def _whole(self, cut_CS: Tensor) -> Tensor:
        """Repeat a clip that is shorter than `clip_samples`."""
        return cut_CS.repeat(1, -(-self.clip_samples // cut_CS.shape[1]))[:, : self.clip_samples]


def cut_clips(blocks: Iterable[Audio], clip_samples: int) -> Iterator[tuple[int, Audio]]:
    """Cut sound in blocks (channels, any length) at `clip_starts`; yield (first sample, (channels, samples)).

    Only a sound that is shorter than a clip gives fewer samples than `clip_samples`.
    """
    held: list[Audio] = []
    waiting = start = 0
    last: Audio | None = None
    for block in blocks:
        held.append(block)
        waiting += block.shape[1]
        if waiting < clip_samples:
            continue
        sound = np.concatenate(held, axis=1)
        while sound.shape[1] >= clip_samples:
            last, sound = sound[:, :clip_samples], sound[:, clip_samples:]
            yield start, last
            start += clip_samples
        held, waiting = [sound], sound.shape[1]
    if last is None:
        if waiting:
            yield 0, np.concatenate(held, axis=1)
    elif 2 * waiting >= clip_samples:
        yield start + waiting - clip_samples, np.concatenate([last, *held], axis=1)[:, -clip_samples:]


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
    start = (make_ae, make_embedder, encode.clip_samples, encode.spool, encode.patience)
    pool = ProcessPoolExecutor(workers, context, _start_worker, start)
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
    make_ae: Callable[[], AudioEncoder],
    make_embedder: Callable[[], Embedder] | None,
    clip_samples: int,
    spool: Path | None,
    patience: float,
) -> None:
    global _worker_encode
    exit_with_parent()
    torch.set_num_threads(1)
    embedder = make_embedder and make_embedder()
    _worker_encode = ClipEncoder(make_ae(), clip_samples, embedder, spool=spool, patience=patience)


def _encode_in_worker(source: SoundFile, keep_audio: bool) -> EncodedFile:
    return _worker_encode(source, keep_audio)
