"""Decodes single streams into sound files for `spresso decode`, and tells which sounds are already there."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from launch.conversions import named
from launch.find_codec import fitting_codec, load_codec
from launch.own_files import DECODE_MARK
from models import bitstream
from models.bitstream import Header
from models.codec import SPresso
from models.disk_errors import patiently
from models.resampling import fit_blocks, resample, resampled_samples
from models.sizes import Sampling
from trainer.data.audio import sound_length, sound_mark, write_blocks


@dataclass
class FileDecoder:
    """Decodes streams with fixed settings."""

    codec: Path | None
    device: str
    seed: int
    steps: int | None
    samples: int
    rate: int | None
    loaded: dict[str, SPresso] = field(default_factory=dict)

    def __call__(self, source: Path, target: Path, progress: Callable[[float], None]) -> None:
        """Decode one file. Raises ValueError, OSError."""
        content = patiently(source.read_bytes)
        with named_errors(source):
            spresso = self._codec(bitstream.model_of(content), source)
            stream = bitstream.read(content, frames_of=spresso.z_frames, coder=spresso.coder())
        target.parent.mkdir(parents=True, exist_ok=True)
        for number, path in enumerate(self.outputs(target)):
            show = partial(self._show, progress, number)
            self._decode(spresso, stream, path, self.seed + number, self._mark(content, number), show)

    def outputs(self, target: Path) -> tuple[Path, ...]:
        """Return the files that are written for a target: itself, or one for each of several samples."""
        if self.samples == 1:
            return (target,)
        return tuple(target.with_suffix(f".{number}{target.suffix}") for number in range(self.samples))

    def _mark(self, content: bytes, number: int) -> str:
        """Return the mark of a decoded sound: the hash of its stream, and the settings that change the sound."""
        steps = "as-stored" if self.steps is None else self.steps
        stream = hashlib.sha256(content).hexdigest()[:16]
        return f"{DECODE_MARK} stream={stream} seed={self.seed + number} steps={steps}"

    def _decode(
        self,
        spresso: SPresso,
        stream: bitstream.Stream,
        path: Path,
        seed: int,
        mark: str,
        show: Callable[[int, int], None],
    ) -> None:
        header, rate = stream.header, self.rate or stream.header.rate
        blocks = spresso.decode_blocks(stream, seed=seed, sampling=self._sampling(spresso), progress=show)
        ours, channels = spresso.autoencoder.sample_rate, header.channels
        audio = resample((block.cpu().numpy() for block in blocks), ours, rate, channels=channels)
        write_blocks(path, fit_blocks(audio, self._length(header), channels=channels), rate, channels, mark=mark)

    def made(self, source: Path, target: Path) -> bool:
        """Whether all outputs bear the mark of this stream and these settings, and have the expected length and rate.

        The mark lies in the sounds themselves, so that neither dates nor records are needed.
        """
        content = patiently(source.read_bytes)
        try:
            header, _ = bitstream.read_header(content)
        except ValueError:
            return False
        expected = (self._length(header), self.rate or header.rate)
        return all(
            path.is_file() and sound_mark(path) == self._mark(content, number) and sound_length(path) == expected
            for number, path in enumerate(self.outputs(target))
        )

    def _length(self, header: Header) -> int:
        return resampled_samples(header.samples, header.rate, self.rate or header.rate)

    def _sampling(self, spresso: SPresso) -> Sampling:
        sampling = spresso.config.sampling
        return sampling if self.steps is None else dataclasses.replace(sampling, steps=self.steps)

    def _show(self, progress: Callable[[float], None], number: int, done: int, total: int) -> None:
        progress((number + done / total) / self.samples)

    def _codec(self, model: str, source: Path) -> SPresso:
        """Return the codec that made a stream. One is kept loaded, because most folders need only one."""
        if model not in self.loaded:
            folder = self.codec or fitting_codec(model, source)
            spresso = (
                next(iter(self.loaded.values())) if self.codec and self.loaded else load_codec(folder, self.device)
            )
            self.loaded = {spresso.model_hash[:8]: spresso}
            if not spresso.model_hash.startswith(model):
                ours = spresso.model_hash[:8]
                raise ValueError(f"{source} was made by model {model}, but {folder} is {ours}: give its codec")
        return self.loaded[model]


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Add the path of a file to the errors that its content causes."""
    try:
        yield
    except ValueError as error:
        raise ValueError(named(path, str(error))) from error
