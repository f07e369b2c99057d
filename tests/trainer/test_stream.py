from __future__ import annotations

import threading
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from trainer.data.order import sample_ids
from trainer.data.shards import DamagedSample, SetInfo, ShardSet, ShardWriter, scan_shard, write_index
from trainer.data.stream import Batch, LatentStream

CHANNELS, FRAMES, SAMPLES, CROP = 3, 40, 23, 12


@pytest.fixture(scope="module")
def shard_set(tmp_path_factory) -> ShardSet:
    """Of sample n, frame t, all channels hold n + t/64."""
    folder: Path = tmp_path_factory.mktemp("set")
    with ShardWriter(folder, max_bytes=15_000) as writer:
        for number in range(SAMPLES):
            frames = np.broadcast_to(number + np.arange(FRAMES) / 64, (CHANNELS, FRAMES))
            writer.write(f"s{number:04d}", frames.astype(np.float16), {})
    info = SetInfo("a", {}, sample_rate=8000, hop=80, latent_channels=CHANNELS, clip_seconds=0.4)
    write_index(folder, info, {name: scan_shard(folder / name) for name in writer.names})
    return ShardSet(folder)


@pytest.fixture
def stream(shard_set: ShardSet) -> LatentStream:
    return LatentStream(shard_set, crop_frames=CROP, global_batch=12, seed=5)


def joined(batches: list[Batch]) -> Batch:
    return Batch(*(torch.cat([getattr(batch, name) for batch in batches]) for name in ("x0", "positions", "ids")))


def assert_equal(one: Batch, other: Batch) -> None:
    for name in ("x0", "positions", "ids"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def starts(batch: Batch) -> torch.Tensor:
    """Where in their clips the crops begin."""
    return ((batch.x0[:, 0, 0] - batch.ids) * 64).round().long()


def test_a_batch_holds_crops_of_its_samples(stream):
    batch = stream.batch(36)
    assert batch.x0.shape == (12, CHANNELS, CROP)
    assert batch.x0.dtype == torch.float32
    assert batch.positions.tolist() == list(range(36, 48))
    ids, _ = sample_ids(np.arange(36, 48), SAMPLES, fingerprint=stream.shard_set.fingerprint, seed=5)
    assert batch.ids.tolist() == ids.tolist()
    expected = batch.ids[:, None, None] + (starts(batch)[:, None] + torch.arange(CROP))[:, None] / 64
    torch.testing.assert_close(batch.x0, expected.expand(-1, CHANNELS, -1).float(), rtol=0, atol=0)


@pytest.mark.parametrize(("world_size", "parts"), [(1, 1), (1, 4), (2, 1), (2, 3), (3, 2), (12, 1), (1, 12), (4, 3)])
def test_a_global_batch_is_the_same_however_it_is_cut(stream, world_size, parts):
    cuts = [
        stream.batch(24, rank=rank, world_size=world_size, part=part, parts=parts)
        for rank in range(world_size)
        for part in range(parts)
    ]
    assert {len(cut.ids) for cut in cuts} == {12 // (world_size * parts)}
    assert_equal(joined(cuts), stream.batch(24))


def test_epochs_run_into_each_other_and_hold_every_sample_once(stream):
    ids = torch.cat([stream.batch(seen).ids for seen in range(0, 23 * 12, 12)])
    for epoch in ids.view(12, SAMPLES):
        assert sorted(epoch.tolist()) == list(range(SAMPLES))
    assert ids[:SAMPLES].tolist() != ids[SAMPLES : 2 * SAMPLES].tolist()


def test_the_stream_depends_on_positions_not_on_where_batches_begin(stream, shard_set):
    other = LatentStream(shard_set, crop_frames=CROP, global_batch=8, seed=5)
    assert_equal(joined([stream.batch(0), stream.batch(12)]), joined([other.batch(0), other.batch(8), other.batch(16)]))


def test_crops_differ_by_epoch_and_seed_and_reach_both_ends(stream, shard_set):
    batch = joined([stream.batch(seen) for seen in range(0, SAMPLES * 48, 12)])
    crops = starts(batch)
    assert (crops.min(), crops.max()) == (0, FRAMES - CROP)
    assert len(set(crops[batch.ids == 3].tolist())) > 10
    other = LatentStream(shard_set, crop_frames=CROP, global_batch=12, seed=6).batch(0)
    assert other.ids.tolist() != stream.batch(0).ids.tolist()
    assert starts(other).tolist() != starts(stream.batch(0)).tolist()


def test_a_crop_may_be_the_whole_clip(shard_set):
    batch = LatentStream(shard_set, crop_frames=FRAMES, global_batch=4, seed=0).batch(0)
    assert starts(batch).tolist() == [0] * 4
    assert batch.x0.shape == (4, CHANNELS, FRAMES)


def test_a_batch_larger_than_the_set(shard_set):
    batch = LatentStream(shard_set, crop_frames=CROP, global_batch=3 * SAMPLES, seed=0).batch(0)
    assert torch.bincount(batch.ids).tolist() == [3] * SAMPLES


@pytest.mark.parametrize("crop_frames", [FRAMES + 1, 0])
def test_crops_that_do_not_fit_are_refused(shard_set, crop_frames):
    with pytest.raises(ValueError, match=f"{crop_frames} frames don't fit .* take crops of 1 to {FRAMES} frames"):
        LatentStream(shard_set, crop_frames=crop_frames, global_batch=4, seed=0)


def test_batches_that_do_not_divide_are_refused(stream, shard_set):
    for cut in ({"world_size": 5}, {"parts": 5}, {"world_size": 4, "parts": 2}):
        with pytest.raises(ValueError, match=r"global batch of 12 can't be cut .* make it a multiple of (5|8)"):
            stream.batch(0, **cut)
    with pytest.raises(ValueError, match="at least 1"):
        LatentStream(shard_set, crop_frames=CROP, global_batch=0, seed=0)


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("latents")]


def test_iterating_gives_a_ranks_batches_in_order(stream):
    batches = stream.iterate(24, rank=1, world_size=2, parts=3)
    for step, batch in enumerate(islice(batches, 7)):
        seen = 24 + 12 * (step // 3)
        assert_equal(batch, stream.batch(seen, rank=1, world_size=2, part=step % 3, parts=3))
    assert len(reading_threads()) == 1
    batches.close()
    assert reading_threads() == []


def test_no_thread_is_left_when_an_iterator_is_dropped_or_fails(stream, monkeypatch):
    next(stream.iterate(0))
    assert reading_threads() == []
    with pytest.raises(ValueError, match="can't be cut"):
        next(stream.iterate(0, world_size=5))
    assert reading_threads() == []

    def fail(ids: np.ndarray) -> None:
        raise DamagedSample("00000.tar is damaged")

    batches = stream.iterate(0)
    next(batches)
    monkeypatch.setattr(stream.shard_set, "latents", fail)
    with pytest.raises(DamagedSample, match="damaged"):
        list(islice(batches, 5))
    assert reading_threads() == []


def test_the_stream_never_changes(stream):
    """Runs under way depend on these numbers."""
    batch = LatentStream(stream.shard_set, crop_frames=CROP, global_batch=6, seed=1).batch(600)
    assert batch.ids.tolist() == [13, 22, 7, 21, 1, 3]
    assert starts(batch).tolist() == [12, 12, 0, 10, 7, 10]
