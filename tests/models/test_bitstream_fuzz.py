"""Whatever bytes a reader is given, it answers with an error or a stream: soon, and without holding more than those."""

from __future__ import annotations

import math
import time
import tracemalloc
import zlib
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from models.bitstream import MAX_SAMPLES, Header, Stream, pack, read, read_header, write
from models.prior import Prior

BOOKS, SIZE = 3, 16
FRAMES = 40
ROOM = 2**24
"""Bytes that reading may hold beside those in proportion to the file: tables of the prior, error messages."""
EACH = 2000
"""Bytes that it may hold for one of the file, which promises at most 16 of packed codes: 32 codes, 8 bytes each, and
some copies."""
SECONDS = 2.0
"""That it may take beside those in proportion to the file, of which a byte promises at most 32 codes here."""

few = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.generate),  # what fails says enough as it is
)


def frames_of(samples: int, rate: int) -> int:
    """11.1 Hz, as the codec has it."""
    return math.ceil(math.ceil(samples * 48_000 / rate) / 4_320)


torch.manual_seed(0)
_prior = Prior(BOOKS, SIZE)
torch.nn.init.normal_(_prior.bias, std=2)
CODER = _prior.coder()


def whole(*, coded: bool, channels: int = 1) -> bytes:
    codes = np.zeros((channels, FRAMES, BOOKS), int) + CODER.bias[:BOOKS].argmax(axis=1)
    gains = (0.0,) * channels
    header = Header("0123abcd", FRAMES * 4_320, 48_000, channels, "separate", BOOKS, SIZE, gains)
    data = write(Stream(header, codes), coder=CODER if coded else None)
    assert bool(read_header(data)[0].prior) == coded
    return data


VALID = [whole(coded=coded, channels=channels) for coded in (False, True) for channels in (1, 2)]


def answers(data: bytes) -> bool:
    """Read it under watch; all else than a stream or a ValueError is a failure. Return whether it is a stream."""
    tracemalloc.start()
    begun = time.process_time()
    try:
        stream, told = read(data, frames_of=frames_of, coder=CODER), "a stream"
    except ValueError as error:
        stream, told = None, str(error)
    finally:
        taken, held = time.process_time() - begun, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert told
    assert "\n" not in told
    if stream is not None:
        assert stream.codes.shape[0] == stream.header.rows
        assert 0 <= stream.codes.min(initial=0) <= stream.codes.max(initial=0) < stream.header.size
    assert taken < SECONDS + 0.05 * len(data)
    assert held < ROOM + EACH * len(data)
    return stream is not None


def sealed(body: bytes) -> bytes:
    """With a checksum that is right."""
    return body + zlib.crc32(body).to_bytes(4, "big")


def varint(number: int) -> bytes:
    groups = [number >> shift & 127 for shift in range(0, 35, 7)]
    while len(groups) > 1 and not groups[-1]:
        groups.pop()
    return bytes([*(group | 128 for group in groups[:-1]), groups[-1]])


@few
@given(st.binary(max_size=300), st.booleans())
def test_random_bytes(data, begun):
    answers((b"SPR\x02" + data) if begun else data)


@few
@given(st.sampled_from(VALID), st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6), st.data())
def test_files_with_bytes_changed_cut_and_put_in(data, changes, draw):
    damaged = bytearray(data[:-4])
    for place, value in changes:
        damaged[place % len(damaged)] = value
    first, last = sorted((draw.draw(st.integers(0, len(damaged))), draw.draw(st.integers(0, len(damaged)))))
    middle = draw.draw(st.sampled_from((bytes(damaged[first:last]), b"", b"\0" * 40, b"\xff" * 40)))
    answers(sealed(bytes(damaged[:first]) + middle + bytes(damaged[last:])))


@few
@given(
    samples=st.one_of(st.integers(0, MAX_SAMPLES), st.integers(0, 10**6)),
    books=st.integers(0, 255),
    sizes=st.integers(0, 255),
    flags=st.integers(0, 255),
    rate=st.one_of(st.none(), st.integers(0, MAX_SAMPLES)),
    payload=st.binary(max_size=500),
)
@example(samples=MAX_SAMPLES, books=255, sizes=255, flags=0x80, rate=None, payload=b"")
@example(samples=MAX_SAMPLES, books=3, sizes=4, flags=0x81, rate=None, payload=b"\0" * 400)
@example(samples=MAX_SAMPLES, books=3, sizes=4, flags=0xF1, rate=MAX_SAMPLES, payload=b"\0" * 400)
@example(samples=10, books=255, sizes=31, flags=0x81, rate=None, payload=CODER.hash + b"\0" * 400)
def test_hostile_headers_with_checksums_that_are_right(samples, books, sizes, flags, rate, payload):
    fields = varint(samples) + bytes([books, sizes, flags]) + (b"" if rate is None else varint(rate))
    answers(sealed(b"SPR\x02" + bytes(4) + fields + payload))


@few
@given(st.integers(0, 16 * 32 * 8), st.binary(min_size=10, max_size=64))
def test_short_payloads_that_promise_many_codes(frames, payload):
    """The true prior's hash before it: so it is decoded, as far as its length allows."""
    fields = varint(frames * 4_320) + bytes([BOOKS, 4, 0x81, 0]) + CODER.hash
    answers(sealed(b"SPR\x02" + bytes(4) + fields + payload))


def mutant(chance: Random) -> bytes:
    """Return a stream with bytes changed, cut out or put in, half of them with a checksum that is right."""
    data = bytearray(chance.choice(VALID)[:-4])
    for _ in range(chance.choice((1, 1, 2, 5))):
        first, last = sorted(chance.randrange(len(data)) for _ in range(2))
        way = chance.randrange(6)
        if way < 3:
            data[first % (len(data) if way else 20)] = chance.randrange(256)
        elif way == 3 and last - first < len(data) // 2:
            del data[first:last]
        else:
            data[first:first] = chance.choice((bytes(40), b"\xff" * 40, data[first:last]))
    return sealed(bytes(data)) if chance.random() < 0.5 else bytes(data) + chance.randbytes(4)


@pytest.mark.slow
def test_thousands_of_mutants(mutant_counts):
    for seed in range(4000):
        mutant_counts.begin("streams")
        mutant_counts.end("streams", refused=not answers(mutant(Random(seed))))
    assert mutant_counts.kinds["streams"]["right"] > 100
    assert mutant_counts.kinds["streams"]["refused"] > 2000


def test_what_is_watched_would_be_seen(monkeypatch):
    """A reader that believes its header is caught by its allocation."""

    def believing(data, **_):
        header, _ = read_header(data)
        codes = np.zeros((1, frames_of(header.samples, header.rate), header.books), np.int64)
        return Stream(header, codes)

    monkeypatch.setitem(globals(), "read", believing)
    with pytest.raises(AssertionError):
        answers(
            sealed(
                b"SPR\x02" + bytes(4) + varint(10**10) + bytes([BOOKS, 4, 0x80, 0]) + pack(np.zeros((4, 3), int), 16)
            )
        )
