"""Encodes sound of any length to codes in bounded memory.

The sound is read twice, block by block: first to choose and level its rows, then to encode them side by side. Of the
whole sound, only the codes are kept. Shape suffixes: C channels, S samples, B = 1 row, T frames of x0, Z channels of z,
N vectors z, M books.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models import windows
from models.bitstream import Header, Stream
from models.channels import Rows
from models.loudness import LARGEST_VALUE
from models.rate_search import RateSearch
from models.resampling import Audio, resample_exactly

if TYPE_CHECKING:
    from models.codec import SPresso

_VECTORS = 4096
"""Vectors z that are quantized at once, about."""


def encode_sound(
    codec: SPresso,
    blocks: Callable[[], Iterable[Audio]],
    *,
    sample_rate: int,
    books: int | None = None,
    channels: str = "auto",
    error_per_bit: float = 0.0,
    progress: Callable[[float], None] | None = None,
) -> Stream:
    """Encode a sound that is read in blocks.

    Args:
        codec: a codec with a quantizer.
        blocks: returns the sound's blocks (channels, any length) from its beginning; it is called twice.
        sample_rate: of the blocks in Hz; they are resampled to the AudioAE's rate.
        books: the number of codebooks to use, counted from the first; None uses all of them.
        channels: `auto`, `separate` or `mid_side`, see `models.channels.Rows`.
        error_per_bit: error that a vector z may add for each bit that its codes save by the codec's prior, in
            thousandths of the variance of z; 0: the least error, whatever the codes cost.
        progress: called with the part of the sound that is encoded, from 0 to 1.

    Raises:
        ValueError: there are no samples, the codec has no quantizer or fewer books, the channels don't fit, or the
            codec can't weigh error against bits.
    """
    quantizer, autoencoder = codec.fitted_quantizer(), codec.autoencoder
    books = quantizer.books if books is None else books
    quantizer.bits(books)  # raises ValueError if the quantizer has fewer
    sound = _Sound(blocks, sample_rate, autoencoder.sample_rate)
    rows = Rows(sound.blocks(), layout=channels, ae_channels=autoencoder.channels)
    given = sound.samples
    frames = codec.z_frames(given, sample_rate)
    encoders = [_RowEncoder(codec, frames, books, error_per_bit) for _ in range(len(rows))]
    audio = _Sequence(sound.blocks())
    for first, last, kept in autoencoder.ranges(rows.samples):
        audio_CS = audio.read(first, last)
        for row, encoder in enumerate(encoders):
            row_BCS = rows.level(audio_CS, row).to(codec.device)
            encoder.push(autoencoder.encode_range(row_BCS, kept), last=last == rows.samples)
        if progress is not None:
            progress(last / rows.samples)
    header = Header(
        model=codec.model_hash[:8],
        samples=given,
        rate=sample_rate,
        channels=rows.channels,
        layout=rows.layout,
        books=books,
        size=quantizer.size,
        gains_db=rows.gains_db,
    )
    return Stream(header, np.stack([encoder.codes_NM for encoder in encoders]))


def check_audio(audio: Any) -> None:
    """Raise ValueError unless audio is a tensor of finite floats with full scale 1, (channels, samples)."""
    wanted = "give a float tensor (channels, samples) with full scale 1"
    if not isinstance(audio, Tensor):
        raise ValueError(f"audio is a {type(audio).__name__}: {wanted}, such as torch.from_numpy(array)")
    if not audio.is_floating_point():
        raise ValueError(f"audio has dtype {audio.dtype}: {wanted}, so divide 16-bit numbers by 32768")
    if audio.ndim != 2 or not audio.numel():
        raise ValueError(f"audio has shape {tuple(audio.shape)}: {wanted}, with at least one sample")
    if len(audio) > audio.shape[1] and len(audio) > 8:
        raise ValueError(f"audio has {len(audio)} channels of {audio.shape[1]} samples: {wanted}; transpose it")
    if not bool(torch.isfinite(audio).all()):
        raise ValueError("audio has values that are not finite (NaN or infinity): replace them")
    if (largest := float(audio.abs().max())) > LARGEST_VALUE:
        raise ValueError(f"audio has values up to {largest:.6g}: {wanted}, so divide 16-bit numbers by 32768")


class _Sound:
    """A sound that can be read again, at the AudioAE's sample rate.

    Attributes:
        samples: the number of samples before resampling, known once `blocks` has ended.
    """

    def __init__(self, blocks: Callable[[], Iterable[Audio]], rate: int, wanted: int) -> None:
        self._blocks, self._rate, self._wanted = blocks, rate, wanted
        self.samples = 0

    def blocks(self) -> Iterator[Tensor]:
        """Yield the blocks (C, …)."""
        counted = self._counted()
        first = next(counted, None)
        if first is None:
            raise ValueError("the sound has no samples")
        every = chain([first], counted)
        for block_CS in resample_exactly(every, self._rate, self._wanted, channels=len(first)):
            yield torch.from_numpy(np.ascontiguousarray(block_CS))

    def _counted(self) -> Iterator[Audio]:
        self.samples = 0
        for block_CS in self._blocks():
            self.samples += block_CS.shape[1]
            if block_CS.shape[1]:
                yield block_CS


class _RowEncoder:
    """Turns x0 of one row, which comes in parts, into codes, as `SPresso.x0_to_z` and the quantizer do with the whole.

    Attributes:
        codes_NM: the codes; complete after the last part.
    """

    def __init__(self, codec: SPresso, z_frames: int, books: int, error_per_bit: float) -> None:
        self._codec, self._books = codec, books
        self._search = rate_search(codec, books, error_per_bit)
        self._pooling, self._window = codec.config.latent_encoder.pooling, codec.config.window
        self._frames = z_frames * self._pooling
        margin = windows.margin_of(self._window, self._pooling)
        self._todo = deque(windows.kept_parts(self._frames, self._window, margin))
        self._x0_BCT: Tensor | None = None
        self._begin = self._done = 0
        self._z: list[Tensor] = []
        at_once = self._codec.fitted_quantizer().vectors_at_once(books)
        self._group = at_once * -(-_VECTORS // at_once)  # a multiple, so that the codes are those of the whole
        wide = np.int16 if codec.fitted_quantizer().size <= 2**15 else np.int32
        self.codes_NM: NDArray[Any] = np.zeros((z_frames, books), wide)

    def push(self, x0_BCT: Tensor, *, last: bool) -> None:
        """Go on with a part of x0; after the `last` one, everything is encoded."""
        self._x0_BCT = x0_BCT if self._x0_BCT is None else torch.cat([self._x0_BCT, x0_BCT], dim=-1)
        if last:
            self._x0_BCT = resize(self._x0_BCT, self._frames - self._begin)
        while self._todo:
            start, first, end = self._todo[0]
            until = min(start + self._window, self._frames)
            if self._begin + self._x0_BCT.shape[-1] < until:
                return
            self._todo.popleft()
            self._x0_BCT, self._begin = self._x0_BCT[..., start - self._begin :], start
            z_BZN = self._codec.g(self._x0_BCT[..., : until - start])
            self._z.append(z_BZN[0, :, (first - start) // self._pooling : (end - start) // self._pooling].T)
            self._quantize(everything=not self._todo)

    def _quantize(self, *, everything: bool) -> None:
        while (waiting := sum(map(len, self._z))) >= self._group or (everything and waiting):
            z_NZ = torch.cat(self._z)
            now_NZ, self._z = z_NZ[: self._group], [z_NZ[self._group :]]
            if self._search is None:
                codes_NM = self._codec.fitted_quantizer().encode(now_NZ, books=self._books)
            else:
                codes_NM = self._search.encode(now_NZ.unsqueeze(0))[0]
            self.codes_NM[self._done : self._done + len(codes_NM)] = codes_NM.cpu().numpy()
            self._done += len(codes_NM)


def rate_search(codec: SPresso, books: int, error_per_bit: float) -> RateSearch | None:
    """Return the search for codes that weighs error against bits; None if the least error is wanted."""
    if error_per_bit == 0:
        return None
    if codec.prior is None:
        raise ValueError(
            "this codec has no prior that says what codes cost: train one (prior.samples), or leave the error per bit "
            "at 0"
        )
    return RateSearch(codec.fitted_quantizer(), codec.prior, error_per_bit=error_per_bit, books=books)


class _Sequence:
    """Blocks that follow one another along the last dimension, to be read in ranges whose beginnings never go back."""

    def __init__(self, blocks: Iterator[Tensor]) -> None:
        self._blocks, self._end = blocks, 0
        self._held: deque[tuple[int, Tensor]] = deque()

    def read(self, first: int, last: int) -> Tensor:
        """Return the range from `first` to `last`, which has to lie inside the sequence."""
        while self._end < last:
            block = next(self._blocks)
            self._held.append((self._end, block))
            self._end += block.shape[-1]
        while self._held[0][0] + self._held[0][1].shape[-1] <= first:
            self._held.popleft()
        parts = [block[..., max(0, first - begin) : last - begin] for begin, block in self._held if begin < last]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def resize(x_BCT: Tensor, frames: int) -> Tensor:
    """Crop to `frames` frames, or extend to that length by repeating the last frame."""
    missing = frames - x_BCT.shape[-1]
    if missing <= 0:
        return x_BCT[..., :frames]
    return torch.cat([x_BCT, x_BCT[..., -1:].expand(*x_BCT.shape[:-1], missing)], dim=-1)
