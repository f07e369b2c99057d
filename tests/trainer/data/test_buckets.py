"""Clips of different lengths: batches of one length, with a mask that the loss honours."""

from __future__ import annotations

import dataclasses
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from launch import pipeline
from trainer.data.order import Buckets
from trainer.data.shard_set import ShardSet
from trainer.data.shards import SetInfo, ShardWriter, scan_shard, write_index
from trainer.data.stream import Batch, LatentStream
from trainer.feed import Feed
from trainer.ranks.parallel import Parallel
from trainer.recipes.schema import Config
from trainer.tasks import make_task

CHANNELS, CROP, BUCKETS = 3, 12, (4, 8)
LENGTHS = [3, 4, 5, 8, 9, 12, 13, 20, 2, 6, 7, 30, 11, 4, 8, 16, 1, 10, 12, 14]


def write_set(folder: Path, lengths: list[int]) -> ShardSet:
    """Of clip n, frame t, all channels hold n + t/64."""
    with ShardWriter(folder) as writer:
        for number, frames in enumerate(lengths):
            x0 = np.broadcast_to(number + np.arange(frames) / 64, (CHANNELS, frames))
            writer.write(f"s{number:04d}", x0.astype(np.float16), {})
    info = SetInfo("a", {}, sample_rate=8000, hop=80, latent_channels=CHANNELS, clip_seconds=0.4)
    write_index(folder, info, {name: scan_shard(folder / name) for name in writer.names})
    return ShardSet(folder)


@pytest.fixture(scope="module")
def shard_set(tmp_path_factory) -> ShardSet:
    return write_set(tmp_path_factory.mktemp("set"), LENGTHS)


def stream(sets, **options) -> LatentStream:
    return LatentStream(sets, **({"crop_frames": CROP, "global_batch": 6, "seed": 5, "buckets": BUCKETS} | options))


def bucket_of(length: int) -> int:
    return next((bucket for bucket in BUCKETS if length <= bucket), CROP)


def assert_whole(batch: Batch) -> None:
    """Every row holds a crop of its clip, as long as the bucket lets it be, and the mask says how long."""
    frames = batch.x0.shape[2]
    mask = torch.ones(batch.x0.shape[::2], dtype=torch.bool) if batch.mask is None else batch.mask
    for row, id_ in enumerate(batch.ids.tolist()):
        length = min(LENGTHS[id_], frames)
        assert bucket_of(LENGTHS[id_]) == frames
        assert mask[row].tolist() == [True] * length + [False] * (frames - length)
        begin = round((float(batch.x0[row, 0, 0]) - id_) * 64)
        assert 0 <= begin <= LENGTHS[id_] - length
        expected = (id_ + (begin + torch.arange(length)) / 64).expand(CHANNELS, -1)
        torch.testing.assert_close(batch.x0[row, :, :length].float(), expected, rtol=0, atol=1e-2)
        assert (batch.x0[row, :, length:] == 0).all()


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 500), min_size=1, max_size=6),
    batch=st.integers(1, 64),
    seed=st.integers(0, 2**32),
    epochs=st.integers(1, 5),
)
def test_every_bucket_gets_the_batches_that_its_samples_fill(sizes, batch, seed, epochs):
    buckets = Buckets(tuple(sizes), batch, seed)
    expected = [epochs * size // batch for size in sizes]
    places = [buckets.place(number) for number in range(sum(expected))]
    for bucket, count in enumerate(expected):
        assert sorted(of for which, of in places if which == bucket) == list(range(count))


def test_far_out_a_place_is_found_at_once():
    bucket, number = Buckets((10**8, 3, 10**9), 256, 0).place(10**12)
    assert bucket in (0, 2)
    assert abs(number / 10**12 - (1 / 11 if bucket == 0 else 10 / 11)) < 1e-5


def test_a_batch_is_of_one_length_and_masked(shard_set):
    lengths = set()
    for seen in range(0, 600, 6):
        batch = stream(shard_set).batch(seen)
        assert_whole(batch)
        lengths.add(batch.x0.shape[2])
    assert lengths == {*BUCKETS, CROP}


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_every_sample_once_an_epoch_for_any_world_and_any_crash(shard_set, data):
    worlds = [(1, 1), (2, 1), (1, 3), (3, 2), (6, 1)]
    epochs = 6  # after six, every bucket's samples fill whole batches of six
    steps = epochs * len(LENGTHS) // 6
    crash = data.draw(st.integers(0, steps))
    parts: list[Batch] = []
    for first, last in ((0, crash), (crash, steps)):
        world_size, cuts = data.draw(st.sampled_from(worlds))
        for rank in range(world_size):
            batches = stream(shard_set).iterate(first * 6, rank=rank, world_size=world_size, parts=cuts)
            for batch in islice(batches, (last - first) * cuts):
                assert_whole(batch)
                parts.append(dataclasses.replace(batch, x0=batch.x0.clone()))
            batches.close()
    ids, positions = (torch.cat([getattr(part, name) for part in parts]) for name in ("ids", "positions"))
    assert sorted(positions.tolist()) == list(range(6 * steps))
    assert torch.bincount(ids).tolist() == [epochs] * len(LENGTHS)
    undisturbed = torch.cat([stream(shard_set).batch(seen).ids for seen in range(0, 6 * steps, 6)])
    assert torch.equal(ids[positions.argsort()], undisturbed)


def test_several_sets_take_turns_by_their_weights(shard_set, tmp_path):
    other = write_set(tmp_path, [5, 6, 12, 2, 9, 7])
    mixed = stream({shard_set: 2, other: 1})
    batches = [mixed.batch(seen) for seen in range(0, 180, 6)]
    assert all(batch.sets.unique().numel() == 1 for batch in batches)
    assert sum(int(batch.sets[0]) for batch in batches) == 10
    alone = [stream(other).batch(6 * step).ids.tolist() for step in range(10)]
    assert [batch.ids.tolist() for batch in batches if batch.sets[0] == 1] == alone


def test_without_buckets_short_clips_are_refused_and_the_mend_is_named(shard_set):
    with pytest.raises(ValueError, match=r"or give data\.buckets="):
        stream(shard_set, buckets=())


def test_a_batch_that_begins_between_two_is_refused(shard_set):
    with pytest.raises(ValueError, match="begin at multiples of 6, not at 3"):
        stream(shard_set).batch(3)


@pytest.fixture
def uneven(tiny, tmp_path) -> Config:
    """The tiny recipe on clips of 90 to 450 ms."""
    config = tiny()
    source = ShardSet(Path(config.data.latents) / "train")
    folder = tmp_path / "uneven/train"
    with ShardWriter(folder) as writer:
        for id_ in range(24):
            writer.write(f"s{id_}", source.latents([id_])[0][:, : 9 + 3 * (id_ % 12)], {})
    write_index(folder, source.info, {name: scan_shard(folder / name) for name in writer.names})
    return tiny(f"data.mix={{{tmp_path / 'uneven'}: 1}}", "data.buckets=[18,27]", "parallel.micro_batch=2")


def test_what_is_padded_counts_in_no_loss(uneven, tmp_path):
    settings = uneven.pretrain
    task = make_task(uneven, "pretrain")
    batches = Feed(uneven, settings, Parallel(uneven.parallel), errors=tmp_path / "errors.jsonl").stream
    padded = next(
        batch for step in range(99) if (batch := batches.batch(step * settings.global_batch)).mask is not None
    )
    assert padded.mask is not None
    inputs = padded.to(torch.device("cpu"))
    with torch.no_grad():
        losses = task.module(inputs).total({})
        unmasked = task.module(dataclasses.replace(inputs, mask=None)).total({})
    full = padded.mask.all(1)
    assert torch.equal(losses[full], unmasked[full])
    assert (losses[~full] != unmasked[~full]).all()


def test_all_stages_learn_from_clips_of_different_lengths(uneven):
    for stage in ("pretrain", "autoencode", "quantize", "finetune"):
        assert pipeline.run_stage(uneven, stage) == "done"
