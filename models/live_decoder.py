"""Decodes an ``.spr`` file while its bytes are still coming, in memory that does not grow with the sound's length.

    bytes ─CodeReader─▶ codes ─quantizer─▶ z ─Wavefront─▶ x0 ─AudioAE─▶ audio

The audio is that of `SPresso.decode` for the whole file, up to the rounding of sums that are grouped otherwise. Shape
suffixes: R rows, C channels of x0, Z channels of z, T frames of x0, N vectors z, M books, S samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models import windows
from models.bitstream import Header, read_beginning
from models.channels import channels_of
from models.code_reader import CodeReader, Frames
from models.distilled import steps_of
from models.encoding import resize
from models.noise_rows import NoiseRow
from models.sizes import Sampling
from models.wavefront import Wavefront, lookahead

if TYPE_CHECKING:
    from models.codec import SPresso


class CutShort(ValueError):
    """The stream ended too early, or its checksum is wrong.

    Attributes:
        samples: the rest of the audio (channels, …), as far as its codes had come.
    """

    def __init__(self, reason: str, samples: Tensor) -> None:
        super().__init__(reason)
        self.samples = samples


class LiveDecoder:
    """Takes the bytes of one stream as they come, and gives its audio as soon as it can; `SPresso.decoder` makes it.

    Attributes:
        delay: seconds of sound whose codes have to have come, at most, beyond the audio that is given. It is infinite
            for an AudioAE that decodes a sound in one piece only.
        header: the stream's header; None until it has come. Unless the header is `in_order`, no audio is given until
            the codes of the last row begin.
    """

    def __init__(self, codec: SPresso, *, seed: int, sampling: Sampling) -> None:
        self._codec, self._seed, self._sampling = codec, seed, sampling
        autoencoder, pooling = codec.autoencoder, codec.config.latent_encoder.pooling
        context = math.inf if autoencoder.context is None else autoencoder.context
        frames = lookahead(codec.config.window, pooling, sampling.steps) + context
        self.delay = frames * autoencoder.hop / autoencoder.sample_rate
        self.header: Header | None = None
        self._beginning = b""
        self._begun: tuple[CodeReader, _Sound] | None = None
        self._at_once = windows.WINDOWS_AT_ONCE * codec.config.window // pooling

    def push(self, data: bytes) -> Tensor:
        """Go on with the next bytes; return the audio that is now known, at the AudioAE's sample rate.

        Returns:
            The samples (channels, …) that follow those returned before; (0, 0) until the header has come.

        Raises:
            ValueError: another model made the stream, or it is damaged.
        """
        return self._joined(self.blocks(data))

    @torch.inference_mode()
    def blocks(self, data: bytes) -> Iterator[Tensor]:
        """Yield what `push` returns in blocks, so that many bytes at once take no more memory than few."""
        if self._begun is None:
            self._beginning += data
            data = self._begin()
        if self._begun is not None:
            reader, sound = self._begun
            for codes_RNM in reader.push(data, at_once=self._at_once):
                yield from sound.push(codes_RNM)

    @torch.inference_mode()
    def flush(self) -> Tensor:
        """Say that the stream has ended; return the rest of its audio (channels, …).

        Raises:
            CutShort: the stream ended too early, or is damaged. The exception has the rest of the audio.
            ValueError: not even the header had come.
        """
        if self._begun is None:
            raise ValueError(f"the .spr file is cut short: {len(self._beginning)} bytes do not even hold its header")
        reader, sound = self._begun
        try:
            codes = list(reader.end(at_once=self._at_once))
        except ValueError as error:
            raise CutShort(str(error), self._joined(sound.rest())) from error
        return self._joined(block for codes_RNM in codes for block in sound.push(codes_RNM))

    def _begin(self) -> bytes:
        """Read the header if it has come; return the bytes that follow it."""
        if (found := read_beginning(self._beginning)) is None:
            return b""
        self.header, length = found
        self._codec.require_own(self.header)
        beginning, following = self._beginning[:length], self._beginning[length:]
        frames = self._codec.z_frames(self.header.samples, self.header.rate)
        reader = CodeReader(self.header, beginning, frames, self._codec.coder())
        self._begun = reader, _Sound(self._codec, self.header, seed=self._seed, sampling=self._sampling)
        return following

    def _joined(self, blocks: Iterator[Tensor]) -> Tensor:
        parts = list(blocks)
        return torch.cat(parts, dim=-1) if parts else torch.zeros(self.header.channels if self.header else 0, 0)


class _Sound:
    """Turns the codes of a stream, which come in parts, into audio (channels, …)."""

    def __init__(self, codec: SPresso, header: Header, *, seed: int, sampling: Sampling) -> None:
        self._codec, self._header, self._sampling = codec, header, sampling
        self._seeds = codec.row_seeds(header, seed)
        self._pooling = codec.config.latent_encoder.pooling
        self._vectors = codec.z_frames(header.samples, header.rate)
        self._left = codec.samples(header.samples, header.rate)
        self._done = self._given = 0  # vectors z that came, samples that were given
        self._z_RZN: Tensor | None = None  # all of a short sound; the last vector of a long one
        self._audio = _Audio(codec, self._vectors * self._pooling)
        self._wave: Wavefront | None = None
        self._noise: list[NoiseRow] = []

    def push(self, codes_RNM: Frames) -> Iterator[Tensor]:
        """Go on with the next codes; yield the audio that is now known."""
        codes = torch.from_numpy(codes_RNM).to(self._codec.device)
        yield from self._from_z(self._codec.fitted_quantizer().decode(codes).transpose(1, 2))

    def rest(self) -> Iterator[Tensor]:
        """Yield the rest of the audio whose codes came, as if the sound stayed as it is in the last vector."""
        known = self._done * self._pooling * self._codec.autoencoder.hop
        while 0 < self._done < self._vectors and self._given < known:
            assert self._z_RZN is not None
            missing = min(self._vectors - self._done, self._codec.config.window)
            for block in self._from_z(self._z_RZN[..., -1:].expand(-1, -1, missing)):
                yield block[..., : max(0, known - self._given + block.shape[-1])]

    def _from_z(self, z_RZN: Tensor) -> Iterator[Tensor]:
        for x0_RCT in self._x0(z_RZN):
            for rows_RCS in self._audio.push(x0_RCT):
                audio = channels_of(rows_RCS[..., : self._left], self._header)
                self._left -= audio.shape[-1]
                self._given += audio.shape[-1]
                yield audio

    def _x0(self, z_RZN: Tensor) -> Iterator[Tensor]:
        """Yield the x0 that is known with the next vectors z."""
        self._done += z_RZN.shape[-1]
        frames, window = self._vectors * self._pooling, self._codec.config.window
        if windows.takes_one_window(frames, window):
            self._z_RZN = z_RZN if self._z_RZN is None else torch.cat([self._z_RZN, z_RZN], dim=-1)
            if self._done == self._vectors:
                noise_RCT = self._codec.noise(self._seeds, self._vectors)
                yield self._codec.z_to_x0(self._z_RZN, noise_RCT, sampling=self._sampling)
            return
        if self._wave is None:
            channels = self._codec.autoencoder.latent_channels
            self._noise = [NoiseRow(seed, channels, frames) for seed in self._seeds]
            steps = steps_of(self._codec, self._sampling)
            self._wave = Wavefront(self._codec.joint_windows(), steps, frames=frames)
        noise_RCT = torch.stack([row.read(z_RZN.shape[-1] * self._pooling) for row in self._noise])
        self._z_RZN = z_RZN[..., -1:]
        x0_RCT = self._wave.push(z_RZN, noise_RCT.to(self._codec.device))
        if x0_RCT is not None:
            yield x0_RCT


class _Audio:
    """Decodes x0, which comes in parts, to rows of levelled audio, as `SPresso.x0_to_blocks` does with the whole."""

    def __init__(self, codec: SPresso, frames: int) -> None:
        self._autoencoder, self._frames = codec.autoencoder, frames
        self._x0_RCT: Tensor | None = None
        self._begin = self._done = 0  # the first frame that is kept, the hops that were decoded

    def push(self, x0_RCT: Tensor) -> Iterator[Tensor]:
        """Go on with the next frames; yield the audio (rows, channels of the AudioAE, …) that is now known."""
        x0_RCT = x0_RCT if self._x0_RCT is None else torch.cat([self._x0_RCT, x0_RCT], dim=-1)
        end, context = self._begin + x0_RCT.shape[-1], self._autoencoder.context
        if end == self._frames:
            x0_RCT = resize(x0_RCT, x0_RCT.shape[-1] + self._autoencoder.surplus_frames)
            until = end
        else:
            until = 0 if context is None else end - context
        if until > self._done:
            yield self._autoencoder.decode_range(x0_RCT, self._begin, self._done, until)
            begin = max(0, until - (context or 0))
            self._done, self._begin, x0_RCT = until, begin, x0_RCT[..., begin - self._begin :]
        self._x0_RCT = x0_RCT
