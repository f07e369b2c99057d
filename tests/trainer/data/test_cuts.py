"""Crops are cut out of clips as they are read: the same values as by slicing each clip, whatever the lengths."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest

from trainer.data.crops import Cuts, Spans
from trainer.data.local_reads import Memory, read_each
from trainer.data.places import Places

CHANNELS, FRAMES, LONGEST = 3, 5, 9


class Batch:
    """A batch of as many clips as there are lengths, to be cut into rows in another order."""

    def __init__(self, lengths: list[int], *, with_mask: bool = True) -> None:
        self.chance = np.random.default_rng(len(lengths))
        self.starts = [int(self.chance.integers(0, max(0, length - FRAMES) + 1)) for length in lengths]
        self.spans = Spans(np.array(lengths), np.array(self.starts))
        self.memory = self.chance.standard_normal((len(lengths), CHANNELS * LONGEST)).astype(np.float16)
        self.rows = self.chance.permutation(len(lengths))
        self.out = self.chance.standard_normal((len(lengths), CHANNELS, FRAMES)).astype(np.float16)
        self.mask = np.ones((len(lengths), FRAMES), bool) if with_mask else None
        self.cuts = Cuts(self.memory, self.spans, self.rows, self.out, self.mask)

    def clip(self, length: int) -> np.ndarray:
        return self.chance.standard_normal((CHANNELS, length)).astype(np.float16)

    def require(self, number: int, clip_CT: np.ndarray, start: int) -> None:
        """Check the crop of a clip, and where it is padded."""
        expected = np.zeros((CHANNELS, FRAMES), np.float16)
        crop = clip_CT[:, start : start + FRAMES]
        expected[:, : crop.shape[1]] = crop
        row = self.rows[number]
        np.testing.assert_array_equal(self.out[row], expected)
        if self.mask is not None:
            np.testing.assert_array_equal(self.mask[row], np.arange(FRAMES) < crop.shape[1])


@pytest.mark.parametrize("at_beginning", [True, False])
def test_crops_are_slices_of_their_clips(at_beginning: bool):
    lengths = [LONGEST, FRAMES, FRAMES + 1, 1, FRAMES - 1, LONGEST - 1]
    batch = Batch(lengths)
    clips = [batch.clip(length) for length in lengths]
    for number, clip_CT in enumerate(clips):
        row = 0 if at_beginning else number
        batch.memory[row, : clip_CT.size] = clip_CT.reshape(-1)
        batch.cuts(number, row * batch.memory.strides[0])
    for number, clip_CT in enumerate(clips):
        batch.require(number, clip_CT, batch.starts[number])


def test_clips_of_one_length_need_no_mask():
    batch = Batch([LONGEST] * 4, with_mask=False)
    for number in range(4):
        clip_CT = batch.clip(LONGEST)
        batch.memory[0] = clip_CT.reshape(-1)
        batch.cuts(number, 0)
        batch.require(number, clip_CT, batch.starts[number])


@pytest.mark.parametrize(("length", "start"), [(LONGEST, LONGEST - FRAMES), (FRAMES, 0), (2, 0)])
def test_another_sample_takes_the_place_of_a_bad_one(length: int, start: int):
    batch = Batch([LONGEST, LONGEST, LONGEST])
    clip_CT = batch.clip(length)
    batch.memory[2, : clip_CT.size] = clip_CT.reshape(-1)
    batch.cuts.replace(2, Spans(np.array([length]), np.array([start])))
    batch.require(2, clip_CT, start)


def contents(count: int) -> list[bytes]:
    return [np.random.default_rng(number).bytes(40 + number) for number in range(count)]


@pytest.mark.parametrize("at_once", [True, False])
def test_a_sample_that_is_not_whole_and_right_is_named_and_never_taken(tmp_path: Path, at_once: bool):
    samples = contents(6)
    path = tmp_path / "shard"
    path.write_bytes(b"".join(samples))
    offsets = np.cumsum([0, *map(len, samples)]).tolist()
    checksums = [zlib.crc32(sample) for sample in samples]
    checksums[1] ^= 1
    row_bytes = 64
    buffer = memoryview(bytearray(row_bytes * len(samples)))
    taken: dict[int, bytes] = {}

    def take(row: int, start: int) -> None:
        taken[row] = bytes(buffer[start : start + len(samples[row])])

    places = [
        (0, offsets[number], len(sample), checksums[number], row_bytes * number, row_bytes * number + len(sample))
        for number, sample in enumerate(samples)
    ]
    places[3] = (1, *places[3][1:])  # a shard that can't be opened
    places[5] = (0, offsets[5] + 1, *places[5][2:])  # its end lies behind that of the shard
    with path.open("rb", buffering=0) as file:

        def open_shard(number: int):
            if number:
                raise OSError(5, "Input/output error")
            return file

        failed = read_each(Places(np.array(places).T), Memory(buffer, row_bytes, take if at_once else None), open_shard)
    assert failed == [1, 3, 5]
    if at_once:
        assert taken == {number: samples[number] for number in (0, 2, 4)}
    else:
        for number in (0, 2, 4):
            assert buffer[row_bytes * number :][: len(samples[number])] == samples[number]
