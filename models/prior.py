"""The prior over codes and its entropy coder, which spends fewer bits on likely codes.

A small network predicts the distribution of each code from earlier codes: those of the same vector's earlier books, and
those of the previous vector. The network is trained in floating point, but the coder evaluates it in integers: weights
are rounded to fixed point, sums are exact in any order, powers of two come from a table of integer roots, and
frequencies are integers. Encoder and decoder therefore compute identical frequencies on any two machines, which a range
coder depends on.

Shape suffixes: B clips, N vectors, M books, K codewords of a book, W width, H hidden width.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from models.range_decoder import PRECISION, RangeDecoder

Integers = npt.NDArray[np.integer[Any]]

LARGEST_SIZE = 2**16
"""Largest number of codewords per book: each needs a frequency above zero, and frequencies have 24 bits in all."""
_FRACTION = 10
"""Fractional bits of weights and activations."""
_LARGEST_WEIGHT = 8.0
_TABLE_BITS = 8
"""Resolution of log-probabilities: 2^-8 bit."""
_UNIT = 30
"""Fractional bits of the powers of two in the table."""
_LOGITS = 2**26
"""Largest number of logits, of all books together, that training keeps in memory: 256 MiB."""
_TABLE_NUMBERS = 2**18
"""Largest number of frequencies that encoding keeps in memory: 2 MiB."""


class Prior(nn.Module):
    """Predicts how many bits each code takes, given the earlier codes; works for any prefix of the books.

    Args:
        books: number of codebooks of the quantizer.
        size: codewords per book of the quantizer.
        width: features of the embedding of the earlier codes.
        hidden: features of the hidden layer between the embedding and the logits.

    Raises:
        ValueError: ``books`` is less than 1, or ``size`` is not from 2 to `LARGEST_SIZE`.
    """

    def __init__(self, books: int, size: int, *, width: int = 16, hidden: int = 16) -> None:
        super().__init__()
        if books < 1 or not 2 <= size <= LARGEST_SIZE:
            raise ValueError(
                f"a prior is over at least 1 book of 2 to {LARGEST_SIZE} codewords, not over {books} books of {size}"
            )
        self.books, self.size, self.width, self.hidden = books, size, width, hidden
        self.same = nn.Parameter(torch.randn(books, size, width) * 0.2)  # embeds a vector's earlier books
        self.before = nn.Parameter(torch.randn(books, size, width) * 0.2)  # embeds the previous vector
        self.start = nn.Parameter(torch.zeros(width))  # replaces `before` for the first vector
        self.mix = nn.Parameter(torch.randn(books, hidden, 2 * width) / math.sqrt(2 * width))
        self.mix_bias = nn.Parameter(torch.zeros(books, hidden))
        self.out = nn.Parameter(torch.zeros(books, size, hidden))
        self.bias = nn.Parameter(torch.zeros(books, size))

    def config(self) -> dict[str, Any]:
        """Return the arguments that build this prior without its weights."""
        return {"books": self.books, "size": self.size, "width": self.width, "hidden": self.hidden}

    @torch.no_grad()
    def fit(self, codes: Tensor) -> None:
        """Initialise the biases to the log-frequencies of each book's codewords in ``codes`` (N, books)."""
        counts_MK = torch.stack([torch.bincount(book, minlength=self.size) for book in codes.T]).double()
        likely = (counts_MK + 0.5) / (counts_MK + 0.5).sum(dim=1, keepdim=True)
        self.bias[: len(likely)] = likely.log2().to(self.bias)

    def forward(self, codes_BNM: Tensor) -> Tensor:
        """Return the bits (B, N, M) that each code of the first M books takes; differentiable."""
        same_BNMW = torch.stack([self.same[book][codes_BNM[..., book]] for book in range(codes_BNM.shape[-1])], dim=2)
        earlier_BNMW = F.pad(same_BNMW.cumsum(dim=2), (0, 0, 1, -1))
        vector_BNW = torch.stack([self.before[m][codes_BNM[..., m]] for m in range(codes_BNM.shape[-1])]).sum(dim=0)
        start_B1W = self.start.expand(len(codes_BNM), 1, -1)
        before_BNW = torch.cat([start_B1W, vector_BNW[:, :-1]], dim=1)
        of_book: Callable[..., Tensor] = self._bits
        if codes_BNM.numel() * self.size > _LOGITS:  # recompute the logits in the backward pass, book by book
            of_book = functools.partial(checkpoint, self._bits, use_reentrant=False)
        bits = [
            of_book(book, earlier_BNMW[:, :, book], before_BNW, codes_BNM[..., book])
            for book in range(codes_BNM.shape[-1])
        ]
        return torch.stack(bits, dim=-1)

    def _bits(self, book: int, earlier_BNW: Tensor, before_BNW: Tensor, codes_BN: Tensor) -> Tensor:
        context = torch.cat([earlier_BNW, before_BNW], dim=-1)
        hidden = F.linear(context, self.mix[book], self.mix_bias[book]).clamp(-1, 1)
        logits = F.linear(hidden, self.out[book], self.bias[book]).flatten(0, 1).float()
        nats = F.cross_entropy(logits * math.log(2), codes_BN.flatten(), reduction="none")
        return nats.unflatten(0, codes_BN.shape) / math.log(2)

    def embedded(self, codes_NM: Tensor) -> Tensor:
        """Return the embedding (N, W) of vectors, which the vectors after them depend on."""
        return torch.stack([self.before[m][codes_N] for m, codes_N in enumerate(codes_NM.unbind(-1))]).sum(dim=0)

    def bits_of_next(self, book: int, earlier_NBW: Tensor, before_NW: Tensor) -> Tensor:
        """Return the bits (N, B, K) of each codeword of a book.

        Args:
            book: the number of the book.
            earlier_NBW: sums of `same` over the codes of the earlier books, for B sequences of codes of each vector.
            before_NW: the previous vectors by `embedded`, or `start`.
        """
        context = torch.cat([earlier_NBW, before_NW.unsqueeze(1).expand_as(earlier_NBW)], dim=-1)
        hidden = F.linear(context, self.mix[book], self.mix_bias[book]).clamp(-1, 1)
        logits = F.linear(hidden, self.out[book], self.bias[book]).float()
        return -F.log_softmax(logits * math.log(2), dim=-1) / math.log(2)

    def coder(self) -> Coder:
        """Return the entropy coder: this prior in integers, as `.spr` files use it."""
        return Coder({name: value.detach().cpu().numpy() for name, value in self.named_parameters()})


class Coder:
    """Entropy-codes codes to bytes and back with a prior in integers; the bytes are the same on every machine."""

    def __init__(self, weights: dict[str, npt.NDArray[np.float32]]) -> None:
        fine = {"mix_bias", "bias"}  # these are added to products of two fixed-point numbers
        fixed = {name: _fixed(value, 2 * _FRACTION if name in fine else _FRACTION) for name, value in weights.items()}
        self.same, self.before, self.start = fixed["same"], fixed["before"], fixed["start"]
        self.mix, self.mix_bias, self.out, self.bias = (fixed[name] for name in ("mix", "mix_bias", "out", "bias"))
        self.books, self.size = self.bias.shape
        self.hash = _hash(fixed)

    # The integers are stored in float64 so that BLAS can be used; below 2^53, products and sums are exact in any order.
    # The largest sum is over the embedding of the earlier codes: 2 · 16 features · 2^13 · 60 codes · 2^13 < 2^38.

    def encode(self, codes: Integers, *, interleaved: bool = False) -> bytes:
        """Encode codes (rows, frames, books) to as few bytes as possible, without trailing zeros.

        One row follows the other, or, if they are `interleaved`, all rows of one frame those of the frame before.

        Raises:
            ValueError: there are more books than the prior has, or codes outside [0, size).
        """
        import constriction  # imported here because only entropy coding needs it

        self._check(codes.shape[-1], codes)
        encoder = constriction.stream.queue.RangeEncoder()
        family = constriction.stream.model.Categorical(perfect=False)
        for context, targets in self._contexts(codes, interleaved):
            encoder.encode(targets.astype(np.int32).ravel(), family, self._tables(context).astype(np.float64))
        return _shortest(encoder)

    def decode(
        self, data: bytes, rows: int, frames: int, books: int, *, interleaved: bool = False
    ) -> npt.NDArray[np.int64]:
        """Decode the codes (rows, frames, books) from the bytes ``data`` that `encode` returned.

        Raises:
            ValueError: there are more books than the prior has, or `encode` can't have returned these bytes.
        """
        self._check(books)
        codes = np.zeros((rows, frames, books), np.int64)
        decoder = VectorDecoder(self, books, rows=rows if interleaved else 1)
        decoder.push(data)
        decoder.end()
        for group in [codes] if interleaved else codes[:, None]:
            decoder.begin_row()
            for frame in range(frames):
                for row in group:
                    vector = decoder.next_vector()
                    assert vector is not None  # all bytes are there
                    row[frame] = vector
        if self.encode(codes, interleaved=interleaved) != data:
            raise ValueError("the entropy-coded payload is damaged: its codes do not encode to the same bytes")
        return codes

    def bits(self, codes: Integers) -> float:
        """Return how many bits codes (rows, frames, books) take, before they are rounded up to bytes."""
        total = 0.0
        for context, targets in self._contexts(codes):
            frequencies = np.take_along_axis(self._tables(context), targets.reshape(-1, 1), axis=1) + 1
            total += float((PRECISION - np.log2(frequencies)).sum())
        return total

    def _contexts(
        self, codes: Integers, interleaved: bool = False
    ) -> Iterator[tuple[npt.NDArray[np.float64], Integers]]:
        """Yield (context (vectors, books, 2 W), codes (vectors, books)) in blocks of frames."""
        books = codes.shape[-1]
        for group in [codes] if interleaved else codes[:, None]:
            last = np.broadcast_to(self.start, (len(group), 1, len(self.start)))
            at_once = max(1, _TABLE_NUMBERS // (self.size * books * len(group)))
            for first in range(0, codes.shape[1], at_once):
                targets = group[:, first : first + at_once]
                same = np.pad(self._sums(self.same, targets)[..., :-1, :], ((0, 0), (0, 0), (1, 0), (0, 0)))
                vectors = np.concatenate([last, self._sums(self.before, targets)[..., -1, :]], axis=1)
                before, last = np.broadcast_to(vectors[:, :-1, None], same.shape), vectors[:, -1:]
                context = np.concatenate([same, before], axis=-1).swapaxes(0, 1)
                yield context.reshape(-1, *context.shape[2:]), targets.swapaxes(0, 1).reshape(-1, books)

    @staticmethod
    def _sums(table: npt.NDArray[np.float64], codes_RNM: Integers) -> npt.NDArray[np.float64]:
        """Return the embeddings (R, N, M, W) summed over the first 1, 2, …, M books."""
        return table[np.arange(codes_RNM.shape[-1]), codes_RNM].cumsum(axis=-2)

    def _tables(self, context_NMW: npt.NDArray[np.float64]) -> Integers:
        """Return the frequencies (N · M, K), ordered by frame, then by book."""
        tables = [self._table(book, context_NMW[:, book]) for book in range(context_NMW.shape[1])]
        return np.stack(tables, axis=1).reshape(-1, self.size)

    def _table(self, book: int, context_NW: npt.NDArray[np.float64]) -> Integers:
        """Return frequencies (N, K) that add up to 2^24 - K; the range coder itself adds one to each."""
        mixed = context_NW @ self.mix[book].T + self.mix_bias[book]
        hidden = np.floor(mixed / 2**_FRACTION + 0.5).clip(-(2**_FRACTION), 2**_FRACTION)
        logits_NK = (hidden @ self.out[book].T + self.bias[book]).astype(np.int64)
        return _frequencies(logits_NK)

    def _check(self, books: int, codes: Integers | None = None) -> None:
        if not 1 <= books <= self.books:
            raise ValueError(f"this prior is over {self.books} books, not {books}")
        if codes is not None and codes.size and not 0 <= codes.min() <= codes.max() < self.size:
            raise ValueError(
                f"this prior is over books of {self.size} codewords, but codes lie in [{codes.min()}, {codes.max()}]"
            )


class VectorDecoder:
    """Decodes vectors of codes whose bytes come in parts, in the order in which a `Coder` encoded them.

    Args:
        coder: the coder.
        books: codes of a vector.
        rows: rows that are interleaved; 1 if one row follows the other.
    """

    def __init__(self, coder: Coder, books: int, *, rows: int) -> None:
        coder._check(books)
        self._coder, self._books, self._range = coder, books, RangeDecoder()
        self._before = deque([coder.start] * rows)  # embedding of each row's vector before, the next row's first
        self._codes: list[int] = []
        self._same = np.zeros_like(coder.start)

    def push(self, data: bytes) -> None:
        """Append bytes of the payload."""
        self._range.push(data)

    def end(self) -> None:
        """Say that the payload is complete."""
        self._range.end()

    def begin_row(self) -> None:
        """Say that the next vector is a row's first; the first one of all is so anyway."""
        self._before = deque([self._coder.start] * len(self._before))

    def next_vector(self) -> list[int] | None:
        """Return the next vector's codes; None if more bytes have to come first. Raises ValueError for damaged ones."""
        coder = self._coder
        while len(self._codes) < self._books:
            if not self._range.ready():
                return None
            book = len(self._codes)
            frequencies = coder._table(book, np.concatenate([self._same, self._before[0]])[None])[0] + 1
            self._codes.append(self._range.decode(frequencies))
            self._same = self._same + coder.same[book, self._codes[-1]]
        codes, self._codes, self._same = self._codes, [], np.zeros_like(coder.start)
        self._before[0] = coder.before[np.arange(self._books), codes].sum(axis=0)
        self._before.rotate(-1)
        return codes


def _fixed(weights: npt.NDArray[np.float32], fraction: int) -> npt.NDArray[np.float64]:
    """Round weights to whole multiples of 2^-fraction; scaling by a power of two and rounding are exact."""
    bound = _LARGEST_WEIGHT if fraction == _FRACTION else 4 * _LARGEST_WEIGHT
    return np.rint(weights.astype(np.float64).clip(-bound, bound) * 2**fraction)


def _hash(fixed: dict[str, npt.NDArray[np.float64]]) -> bytes:
    """Return two bytes of a hash that identifies the prior."""
    digest = hashlib.sha256(json.dumps({name: list(value.shape) for name, value in sorted(fixed.items())}).encode())
    for name in sorted(fixed):
        digest.update(fixed[name].astype("<i4").tobytes())
    return digest.digest()[:2]


def _frequencies(logits_NK: Integers) -> Integers:
    """Return integers (N, K) proportional to 2^logits (in units of 2^-20); each row adds up to 2^24 - K."""
    below = (logits_NK.max(axis=1, keepdims=True) - logits_NK) >> (2 * _FRACTION - _TABLE_BITS)
    weights = _powers()[below & (2**_TABLE_BITS - 1)] >> np.minimum(below >> _TABLE_BITS, _UNIT + 1)
    total = 2**PRECISION - logits_NK.shape[1]
    share = (total << _UNIT) // weights.sum(axis=1, keepdims=True)  # at most 2^24, as the likeliest weight is 2^30
    frequencies = (weights * share) >> _UNIT
    likeliest = logits_NK.argmax(axis=1)
    frequencies[np.arange(len(logits_NK)), likeliest] += total - frequencies.sum(axis=1)
    return frequencies


@functools.cache
def _powers() -> Integers:
    """Return 2^(-k / 256) for k = 0 … 255 in units of 2^-30, rounded down, by eight nested integer square roots."""
    steps, powers = 2**_TABLE_BITS, []
    for step in range(steps):
        power = 1 << (_UNIT * steps - step)
        for _ in range(_TABLE_BITS):
            power = math.isqrt(power)
        powers.append(power)
    return np.array(powers, np.int64)


def _shortest(encoder: Any) -> bytes:
    """Return the shortest bytes that decode to what was encoded; the decoder reads zeros beyond their end.

    The encoder ends with an interval of numbers that all decode to the same codes, and itself returns one of them as
    whole 32-bit words. This function picks the number in the interval with the most trailing zeros.
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
    raise AssertionError("the interval contains its first number")
