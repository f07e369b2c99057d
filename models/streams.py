"""What a codec does between sounds and streams: rows of codes in, blocks of audio out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.bitstream import Header, Stream
from models.channels import Rows, channels_of

if TYPE_CHECKING:
    from models.codec import SPresso
    from models.codec_config import Sampling

_OTHER_ROW = 2**31
"""Added to the seed for the side: with the mid's own noise all that is made up would lean to one channel."""


def encode(
    codec: SPresso, audio: Tensor, *, books: int | None, channels: str, origin: tuple[int, int] | None
) -> Stream:
    """See `SPresso.encode`."""
    quantizer = codec.fitted_quantizer()
    rows = Rows(audio, layout=channels, ae_channels=codec.autoencoder.channels)
    samples, rate = origin or (audio.shape[-1], codec.autoencoder.sample_rate)
    codes = torch.stack([_encode_row(codec, rows, row, books) for row in range(len(rows))])
    header = Header(
        model=codec.model_hash[:8],
        samples=samples,
        rate=rate,
        channels=len(audio),
        layout=rows.layout,
        books=codes.shape[-1],
        size=quantizer.size,
        gains_db=rows.gains_db,
    )
    return Stream(header, codes.cpu().numpy())


def _encode_row(codec: SPresso, rows: Rows, row: int, books: int | None) -> Tensor:
    def read(first: int, last: int) -> Tensor:
        return rows.read(row, first, last).to(codec.device)

    samples = rows.audio.shape[-1]
    z_1ZN = codec.x0_to_z(codec.autoencoder.encode_blocks(read, samples), codec.z_frames(samples))
    return codec.fitted_quantizer().encode(z_1ZN[0].T, books=books)


def decode_blocks(
    codec: SPresso,
    stream: Stream,
    *,
    seed: int,
    sampling: Sampling | None,
    progress: Callable[[int, int], None] | None,
) -> Iterator[Tensor]:
    """See `SPresso.decode_blocks`."""
    header = stream.header
    _require_own(codec, header)
    z_RZN = codec.fitted_quantizer().decode(torch.from_numpy(stream.codes).to(codec.device)).transpose(1, 2)
    seeds = [seed + row * _OTHER_ROW if header.layout == "mid_side" else seed for row in range(header.rows)]
    x0_RCT = codec.z_to_x0(z_RZN, codec.noise(seeds, z_RZN.shape[-1]), sampling=sampling, progress=progress)
    left = codec.samples(header.samples, header.rate)
    for rows_RCS in codec.x0_to_blocks(x0_RCT):
        audio = channels_of(rows_RCS[..., :left], header)
        left -= audio.shape[-1]
        yield audio


def _require_own(codec: SPresso, header: Header) -> None:
    quantizer = codec.fitted_quantizer()
    if header.model != codec.model_hash[:8]:
        raise ValueError(
            f"the stream was made by model {header.model}, this is {codec.model_hash[:8]}: "
            "decode it with the codec that encoded it"
        )
    if header.size != quantizer.size or header.books > quantizer.books or not header.samples:
        raise ValueError(
            f"the stream is damaged: {header.samples} samples in {header.books} books of {header.size}, and this codec "
            f"has {quantizer.books} of {quantizer.size}"
        )
