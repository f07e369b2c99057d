"""The prior over codes, and the entropy coder on top: what is likely takes fewer bits.

A small network gives the distribution of each code from the codes before it: the earlier books of the same vector, and
the vector before. It is trained in floating point, and used in integers: weights rounded to fixed point, sums that are
exact in any order, a table of powers of two made by integer roots, integer frequencies. So encoder and decoder, on
whatever machines, have the same frequencies to the last digit, which a range coder stands on.

Shape suffixes: B clips, N vectors, M books, K codewords of a book, W width, H hidden width.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

Integers = npt.NDArray[np.int64]

LARGEST_SIZE = 2**16
"""Codewords of a book at most: every codeword has a frequency above zero, and frequencies have 24 bits."""
PRECISION = 24
"""log2 of what the frequencies of a code add up to; the range coder's own precision."""
_FRACTION = 10
"""Bits behind the binary point of weights and activations."""
_LARGEST_WEIGHT = 8.0
_TABLE_BITS = 8
"""Log-probabilities are resolved to 2^-8 bit."""
_UNIT = 30
"""Bits of a power of two in the table."""
_LOGITS = 2**26
"""Logits of all books that training holds at once: 256 MiB."""
_TABLE_NUMBERS = 2**18
"""Frequencies that are held at once while encoding: 2 MiB."""


class Prior(nn.Module):
    """Bits that a code takes, given the codes before it; a prefix of the books works as all of them do.

    Args:
        books, size: of the quantizer.
        width: features of what is known of the codes before.
        hidden: features between that and the logits.

    Raises:
        ValueError: less than one book, or a size that the coder has no frequencies for.
    """

    def __init__(self, books: int, size: int, *, width: int = 16, hidden: int = 16) -> None:
        super().__init__()
        if books < 1 or not 2 <= size <= LARGEST_SIZE:
            raise ValueError(f"a prior is over books of 2 to {LARGEST_SIZE} codewords, not {books} of {size}")
        self.books, self.size, self.width, self.hidden = books, size, width, hidden
        self.same = nn.Parameter(torch.randn(books, size, width) * 0.2)  # of the earlier books of a vector
        self.before = nn.Parameter(torch.randn(books, size, width) * 0.2)  # of the vector before
        self.start = nn.Parameter(torch.zeros(width))  # in place of it at the first vector
        self.mix = nn.Parameter(torch.randn(books, hidden, 2 * width) / math.sqrt(2 * width))
        self.mix_bias = nn.Parameter(torch.zeros(books, hidden))
        self.out = nn.Parameter(torch.zeros(books, size, hidden))
        self.bias = nn.Parameter(torch.zeros(books, size))

    def config(self) -> dict[str, Any]:
        """The arguments that it was made with."""
        return {"books": self.books, "size": self.size, "width": self.width, "hidden": self.hidden}

    @torch.no_grad()
    def fit(self, codes: Tensor) -> None:
        """Begin with how often each codeword of each book occurs in ``codes`` (N, books), the codes before left out."""
        counts_MK = torch.stack([torch.bincount(book, minlength=self.size) for book in codes.T]).double()
        likely = (counts_MK + 0.5) / (counts_MK + 0.5).sum(dim=1, keepdim=True)
        self.bias[: len(likely)] = likely.log2().to(self.bias)

    def forward(self, codes_BNM: Tensor) -> Tensor:
        """Bits (B, N, M) of each of the codes, of all the books or the first M of them; differentiable."""
        same_BNMW = torch.stack([self.same[book][codes_BNM[..., book]] for book in range(codes_BNM.shape[-1])], dim=2)
        earlier_BNMW = F.pad(same_BNMW.cumsum(dim=2), (0, 0, 1, -1))
        vector_BNW = torch.stack([self.before[m][codes_BNM[..., m]] for m in range(codes_BNM.shape[-1])]).sum(dim=0)
        start_B1W = self.start.expand(len(codes_BNM), 1, -1)
        before_BNW = torch.cat([start_B1W, vector_BNW[:, :-1]], dim=1)
        of_book: Callable[..., Tensor] = self._bits
        if codes_BNM.numel() * self.size > _LOGITS:  # then they are computed again in the backward pass, book by book
            of_book = functools.partial(checkpoint, self._bits, use_reentrant=False)
        bits = [
            of_book(book, earlier_BNMW[:, :, book], before_BNW, codes_BNM[..., book])
            for book in range(codes_BNM.shape[-1])
        ]
        return torch.stack(bits, dim=-1)

    def _bits(self, book: int, earlier_BNW: Tensor, before_BNW: Tensor, codes_BN: Tensor) -> Tensor:
        known = torch.cat([earlier_BNW, before_BNW], dim=-1)
        hidden = F.linear(known, self.mix[book], self.mix_bias[book]).clamp(-1, 1)
        logits = F.linear(hidden, self.out[book], self.bias[book]).flatten(0, 1).float()
        nats = F.cross_entropy(logits * math.log(2), codes_BN.flatten(), reduction="none")
        return nats.unflatten(0, codes_BN.shape) / math.log(2)

    def coder(self) -> Coder:
        """The same in integers, as files are written with it."""
        return Coder({name: value.detach().cpu().numpy() for name, value in self.named_parameters()})


class Coder:
    """Codes ↔ bytes by a prior's integers; the same bytes on every machine."""

    def __init__(self, weights: dict[str, npt.NDArray[np.float32]]) -> None:
        fine = {"mix_bias", "bias"}  # these are added to products of two
        fixed = {name: _fixed(value, 2 * _FRACTION if name in fine else _FRACTION) for name, value in weights.items()}
        self.same, self.before, self.start = fixed["same"], fixed["before"], fixed["start"]
        self.mix, self.mix_bias, self.out, self.bias = (fixed[name] for name in ("mix", "mix_bias", "out", "bias"))
        self.books, self.size = self.bias.shape
        self.hash = _hash(fixed)

    # Integers below 2^53 are held in float64, where their products and sums are exact in any order: BLAS is used on
    # them. The largest sum is that over the known features: 2 · 16 features · 2^13 · 60 codes · 2^13 < 2^38.

    def encode(self, codes: Integers) -> bytes:
        """The bytes of codes (rows, frames, books); as few as there can be, trailing zeros left out.

        Raises:
            ValueError: more books than the prior has, or codes outside its books.
        """
        import constriction  # here: only entropy coding needs it

        self._check(codes.shape[-1], codes)
        encoder = constriction.stream.queue.RangeEncoder()
        family = constriction.stream.model.Categorical(perfect=False)
        for known, wanted in self._portions(codes):
            encoder.encode(wanted.astype(np.int32).ravel(), family, self._tables(known).astype(np.float64))
        return _shortest(encoder)

    def decode(self, data: bytes, rows: int, frames: int, books: int) -> Integers:
        """The codes (rows, frames, books) that `encode` made ``data`` of.

        Raises:
            ValueError: more books than the prior has, or bytes that are no such codes.
        """
        import constriction

        self._check(books)
        words = np.frombuffer(data + bytes(-len(data) % 4), ">u4").astype(np.uint32)
        decoder, categorical = constriction.stream.queue.RangeDecoder(words), constriction.stream.model.Categorical
        codes = np.zeros((rows, frames, books), np.int64)
        try:
            for before, frame in self._frames(codes):
                same = np.zeros(self.same.shape[2])
                for book in range(books):
                    table_1K = self._table(book, np.concatenate([same, before])[None])
                    frame[book] = decoder.decode(categorical(table_1K[0].astype(np.float64), perfect=False))
                    same = same + self.same[book, frame[book]]
        except AssertionError as error:  # what constriction raises where bytes stand for nothing
            raise ValueError("the entropy-coded payload is damaged") from error
        if self.encode(codes) != data:
            raise ValueError("the entropy-coded payload is damaged: its codes would be written as other bytes")
        return codes

    def bits(self, codes: Integers) -> float:
        """What codes (rows, frames, books) take by these frequencies, before they are rounded up to bytes."""
        total = 0.0
        for known, wanted in self._portions(codes):
            frequencies = np.take_along_axis(self._tables(known), wanted.reshape(-1, 1), axis=1) + 1
            total += float((PRECISION - np.log2(frequencies)).sum())
        return total

    def _frames(self, codes: Integers) -> Iterator[tuple[npt.NDArray[np.float64], Integers]]:
        """Of each frame what is known of the one before, and its codes, to be filled in."""
        for row in codes:
            before = self.start
            for frame in row:
                yield before, frame
                before = self.before[np.arange(len(frame)), frame].sum(axis=0)

    def _portions(self, codes: Integers) -> Iterator[tuple[npt.NDArray[np.float64], Integers]]:
        """What is known before each code (frames, books, 2 W), and the codes (frames, books), some frames at a time."""
        books = codes.shape[-1]
        at_once = max(1, _TABLE_NUMBERS // (self.size * books))
        for row in codes:
            vectors = np.concatenate([self.start[None], self._sums(self.before, row[:-1])[:, -1]])[: len(row)]
            for first in range(0, len(row), at_once):
                wanted = row[first : first + at_once]
                same = np.pad(self._sums(self.same, wanted)[:, :-1], ((0, 0), (1, 0), (0, 0)))
                before = np.broadcast_to(vectors[first : first + at_once, None], same.shape)
                yield np.concatenate([same, before], axis=-1), wanted

    @staticmethod
    def _sums(table: npt.NDArray[np.float64], codes_NM: Integers) -> npt.NDArray[np.float64]:
        """Sums (N, M, W) over the first 1, 2 … books."""
        return table[np.arange(codes_NM.shape[1]), codes_NM].cumsum(axis=1)

    def _tables(self, known_NMW: npt.NDArray[np.float64]) -> Integers:
        """Frequencies (N · M, K), all books of a frame after one another."""
        books = known_NMW.shape[1]
        return np.stack([self._table(book, known_NMW[:, book]) for book in range(books)], axis=1).reshape(-1, self.size)

    def _table(self, book: int, known_NW: npt.NDArray[np.float64]) -> Integers:
        """Frequencies (N, K) that add up to 2^24 - K; the coder itself adds one to each."""
        mixed = known_NW @ self.mix[book].T + self.mix_bias[book]
        hidden = np.floor(mixed / 2**_FRACTION + 0.5).clip(-(2**_FRACTION), 2**_FRACTION)
        logits_NK = (hidden @ self.out[book].T + self.bias[book]).astype(np.int64)
        return _frequencies(logits_NK)

    def _check(self, books: int, codes: Integers | None = None) -> None:
        if not 1 <= books <= self.books:
            raise ValueError(f"this prior is over {self.books} books, not {books}")
        if codes is not None and codes.size and not 0 <= codes.min() <= codes.max() < self.size:
            raise ValueError(f"this prior is over books of {self.size}: codes lie in [{codes.min()}, {codes.max()}]")


def _fixed(weights: npt.NDArray[np.float32], fraction: int) -> npt.NDArray[np.float64]:
    """Weights as whole multiples of 2^-fraction: scaling by a power of two and rounding are exact."""
    bound = _LARGEST_WEIGHT if fraction == _FRACTION else 4 * _LARGEST_WEIGHT
    return np.rint(weights.astype(np.float64).clip(-bound, bound) * 2**fraction)


def _hash(fixed: dict[str, npt.NDArray[np.float64]]) -> bytes:
    """Two bytes that tell priors apart."""
    digest = hashlib.sha256(json.dumps({name: list(value.shape) for name, value in sorted(fixed.items())}).encode())
    for name in sorted(fixed):
        digest.update(fixed[name].astype("<i4").tobytes())
    return digest.digest()[:2]


def _frequencies(logits_NK: Integers) -> Integers:
    """Integers (N, K) in proportion to 2^logits (in units of 2^-20), of the sum 2^24 - K each."""
    below = (logits_NK.max(axis=1, keepdims=True) - logits_NK) >> (2 * _FRACTION - _TABLE_BITS)
    weights = _powers()[below & (2**_TABLE_BITS - 1)] >> np.minimum(below >> _TABLE_BITS, _UNIT + 1)
    total = 2**PRECISION - logits_NK.shape[1]
    share = (total << _UNIT) // weights.sum(axis=1, keepdims=True)  # at most 2^24: the likeliest weighs 2^30
    frequencies = (weights * share) >> _UNIT
    likeliest = logits_NK.argmax(axis=1)
    frequencies[np.arange(len(logits_NK)), likeliest] += total - frequencies.sum(axis=1)
    return frequencies


@functools.cache
def _powers() -> Integers:
    """2^(-k / 256) for k of 0 … 255, in units of 2^-30, rounded down: by integer square roots, eight deep."""
    steps, powers = 2**_TABLE_BITS, []
    for step in range(steps):
        power = 1 << (_UNIT * steps - step)
        for _ in range(_TABLE_BITS):
            power = math.isqrt(power)
        powers.append(power)
    return np.array(powers, np.int64)


def _shortest(encoder: Any) -> bytes:
    """The shortest bytes that the decoder, which reads zeros beyond them, takes for what was encoded.

    The coder ends with an interval of numbers that all stand for the same codes, and gives one as whole words of 32
    bits; taken here is the one in it that ends with the most zeros.
    """
    if encoder.is_empty():
        return b""
    words = encoder.get_compressed()
    position, (lower, span) = encoder.pos()
    width = 32 * (position + 2)
    inside = int.from_bytes(words.astype(">u4").tobytes(), "big") << (width - 32 * len(words))
    first = inside - (inside - lower) % 2**64
    for zeros in range(width, -1, -8):
        point = -(-first >> zeros) << zeros
        if point < first + span and point < 1 << width:
            return point.to_bytes(width // 8, "big")[: (width - zeros) // 8]
    raise AssertionError("an interval holds its own beginning")
