"""A range decoder whose bytes may come in parts: the counterpart of constriction's `RangeEncoder`.

It reads 32-bit words, most significant byte first, into a state of 64 bits (Martin 1979). Frequencies add up to 2^24.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

PRECISION = 24
"""log2 of the sum of a symbol's frequencies."""
_WORD_BYTES, _WORD_BITS = 4, 32
_STATE = 2**64 - 1


class RangeDecoder:
    """Decodes symbols; zeros follow after the last byte, once `end` is called."""

    def __init__(self) -> None:
        self._bytes, self._ended = bytearray(), False
        self._lower, self._range, self._point = 0, _STATE, 0
        self._missing = 2  # words of `_point` that are still to be read

    def push(self, data: bytes) -> None:
        """Append bytes."""
        self._bytes += data

    def end(self) -> None:
        """Say that all bytes are there."""
        self._bytes += bytes(-len(self._bytes) % _WORD_BYTES)
        self._ended = True

    def ready(self) -> bool:
        """Whether the next symbol can be decoded without more bytes."""
        while self._missing and (self._ended or len(self._bytes) >= _WORD_BYTES):
            word = int.from_bytes(self._bytes[:_WORD_BYTES], "big")
            del self._bytes[:_WORD_BYTES]
            self._point = (self._point << _WORD_BITS | word) & _STATE
            self._missing -= 1
        return not self._missing

    def decode(self, frequencies: NDArray[np.integer[Any]]) -> int:
        """Return the next symbol, an index of ``frequencies``, each at least 1; call it only if `ready`.

        Raises:
            ValueError: no encoder writes these bytes.
        """
        ends = frequencies.cumsum()
        scale = self._range >> PRECISION
        quantile = ((self._point - self._lower) & _STATE) // scale
        if quantile >= 1 << PRECISION:
            raise ValueError("the entropy-coded payload is damaged")
        symbol = int(np.searchsorted(ends, quantile, side="right"))
        probability = int(frequencies[symbol])
        self._lower = (self._lower + scale * (int(ends[symbol]) - probability)) & _STATE
        self._range = scale * probability
        if self._range < 1 << _WORD_BITS:
            self._lower = self._lower << _WORD_BITS & _STATE
            self._range <<= _WORD_BITS
            self._missing = 1
        return symbol
