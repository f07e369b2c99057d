"""The range decoder beside constriction's."""

from __future__ import annotations

import constriction
import numpy as np
import pytest

from models.range_decoder import PRECISION, RangeDecoder


def tables(count: int, size: int, sharpness: float) -> np.ndarray:
    """Return frequencies (count, size) of at least 1 that add up to 2^24."""
    random = np.random.default_rng(size)
    weights = random.random((count, size)) ** sharpness
    shares = np.floor(weights / weights.sum(1, keepdims=True) * (2**PRECISION - size)).astype(np.int64)
    shares[:, 0] += 2**PRECISION - size - shares.sum(1)
    return shares + 1


@pytest.mark.parametrize(("size", "sharpness"), [(2, 1), (2, 40), (16, 8), (256, 1), (4096, 60)])
@pytest.mark.parametrize("portion", [1, 3, 1000])
def test_symbols_of_constrictions_encoder_come_back_from_bytes_in_portions(size, sharpness, portion):
    frequencies = tables(300, size, sharpness)
    random = np.random.default_rng(1)
    symbols = np.array([random.choice(size, p=row / row.sum()) for row in frequencies], np.int32)
    encoder = constriction.stream.queue.RangeEncoder()
    family = constriction.stream.model.Categorical(perfect=False)
    encoder.encode(symbols, family, (frequencies - 1).astype(np.float64))
    data = encoder.get_compressed().astype(">u4").tobytes()
    decoder, found = RangeDecoder(), []
    for first in range(0, len(data), portion):
        decoder.push(data[first : first + portion])
        while len(found) < 300 and decoder.ready():
            found.append(decoder.decode(frequencies[len(found)]))
    decoder.end()
    while len(found) < 300:
        assert decoder.ready()
        found.append(decoder.decode(frequencies[len(found)]))
    assert found == symbols.tolist()


def test_bytes_that_no_encoder_writes_are_refused():
    decoder = RangeDecoder()
    decoder.push(b"\xff" * 8)
    decoder.end()
    assert decoder.ready()
    with pytest.raises(ValueError, match="damaged"):
        decoder.decode(tables(1, 16, 1)[0])
