from __future__ import annotations

import dataclasses
import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainer.data.places import Reads
from trainer.data.shard_set import ShardSet
from trainer.data.shards import SetInfo, ShardWriter, scan_shard, write_index
from trainer.data.stream import Batch, LatentStream, Shuffle

CHANNELS, FRAMES, SAMPLES, CROP = 3, 40, 23, 12
FIELDS = ("x0", "positions", "ids", "sets")


def write_set(folder: Path, clips: list[tuple[float, int, int]], identity: str = "a") -> ShardSet:
    """Of clip (n, step, frames), frame t, all channels hold n + step · t/64."""
    with ShardWriter(folder, max_bytes=15_000) as writer:
        for number, (value, step, frames) in enumerate(clips):
            x0 = np.broadcast_to(value + step * np.arange(frames) / 64, (CHANNELS, frames))
            writer.write(f"s{number:04d}", x0.astype(np.float16), {})
    info = SetInfo(identity, {}, sample_rate=8000, hop=80, latent_channels=CHANNELS, clip_seconds=0.4)
    write_index(folder, info, {name: scan_shard(folder / name) for name in writer.names})
    return ShardSet(folder)


@pytest.fixture(scope="module")
def shard_set(tmp_path_factory) -> ShardSet:
    return write_set(tmp_path_factory.mktemp("set"), [(number, 1, FRAMES) for number in range(SAMPLES)])


@pytest.fixture
def stream(shard_set: ShardSet) -> LatentStream:
    return LatentStream(shard_set, crop_frames=CROP, global_batch=12, seed=5)


def joined(batches: list[Batch]) -> Batch:
    """In the order of positions."""
    parts = {name: torch.cat([getattr(batch, name) for batch in batches]) for name in FIELDS}
    order = parts["positions"].argsort()
    return Batch(**{name: part[order] for name, part in parts.items()})


def assert_equal(one: Batch, other: Batch) -> None:
    for name in FIELDS:
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def starts(batch: Batch) -> torch.Tensor:
    """Where in their clips the crops begin."""
    return ((batch.x0[:, 0, 0].float() - batch.ids) * 64).round().long()


def test_a_batch_holds_crops_of_its_samples(stream):
    batch = stream.batch(36)
    assert batch.x0.shape == (12, CHANNELS, CROP)
    assert batch.x0.dtype == torch.float16
    assert batch.positions.tolist() == list(range(36, 48))
    ids = Shuffle().order(stream.sets[0], 5).ids(np.arange(36, 48))
    assert batch.ids.tolist() == ids.tolist()
    expected = batch.ids[:, None, None] + (starts(batch)[:, None] + torch.arange(CROP))[:, None] / 64
    torch.testing.assert_close(batch.x0, expected.expand(-1, CHANNELS, -1).half(), rtol=0, atol=0)


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
        with pytest.raises(ValueError, match=r"batch of 12 can't be split .* set global_batch to a multiple of (5|8)"):
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
    with pytest.raises(ValueError, match="can't be split"):
        next(stream.iterate(0, world_size=5))
    assert reading_threads() == []

    def fail(reads: Reads, out: np.ndarray, taken: object) -> None:
        raise OSError("the disk is gone")

    batches = stream.iterate(0)
    next(batches)
    monkeypatch.setattr(stream.sets[0], "read_planned", fail)
    with pytest.raises(OSError, match="gone"):
        list(islice(batches, 5))
    assert reading_threads() == []


# ---- damage


def damage(shard_set: ShardSet, ids: list[int]) -> None:
    """Flip a bit in the latents of samples."""
    for id_ in ids:
        path = (
            shard_set.folder
            / json.loads((shard_set.folder / "set.json").read_text())["shards"][shard_set.index["shard"][id_]]["name"]
        )
        content = bytearray(path.read_bytes())
        content[int(shard_set.index["x0_offset"][id_]) + 7] ^= 1
        path.write_bytes(content)


@pytest.fixture
def damaged(shard_set, tmp_path) -> ShardSet:
    """The set with samples 3, 4 and 11 damaged."""
    folder = shutil.copytree(shard_set.folder, tmp_path / "damaged")
    damage(ShardSet(folder), [3, 4, 11])
    return ShardSet(folder)


@pytest.mark.parametrize("crop_frames", [CROP, FRAMES])
@pytest.mark.parametrize("lanes", [1, 4])
def test_a_damaged_sample_is_replaced_alike_on_every_rank_and_named_once(
    damaged, shard_set, tmp_path, crop_frames, lanes
):
    shuffle = Shuffle("windowed", block=2, window=16, lanes=lanes)
    options = {"crop_frames": crop_frames, "global_batch": SAMPLES * 4, "seed": 5, "shuffle": shuffle}
    stream = LatentStream(damaged, **options, errors=tmp_path / "data_errors.jsonl", max_damaged=0.2)
    whole, sound = stream.batch(0), LatentStream(shard_set, **options).batch(0)
    lost = torch.isin(sound.ids, torch.tensor([3, 4, 11]))
    assert lost.sum() == 3 * 4
    for name in FIELDS:
        assert torch.equal(getattr(whole, name)[~lost], getattr(sound, name)[~lost])
    assert torch.equal(whole.positions, sound.positions)
    assert not torch.isin(whole.ids, torch.tensor([3, 4, 11])).any()
    order = shuffle.order(damaged, 5)
    for position, id_ in zip(whole.positions[lost].tolist(), whole.ids[lost].tolist(), strict=True):
        later = order.ids(position + lanes * np.arange(1, 9)).tolist()
        assert id_ == next(candidate for candidate in later if candidate not in (3, 4, 11))
    torch.testing.assert_close(whole.x0[:, 0, 0].float(), whole.ids + starts(whole) / 64, rtol=0, atol=1e-2)
    ranks = [
        LatentStream(damaged, **options, max_damaged=0.2).batch(0, rank=rank, world_size=4, part=part, parts=SAMPLES)
        for rank in range(4)
        for part in range(SAMPLES)
    ]
    assert_equal(joined(ranks), whole)
    lines = [json.loads(line) for line in (tmp_path / "data_errors.jsonl").read_text().splitlines()]
    assert sorted(line["sample"] for line in lines) == [3, 4, 11]
    for line in lines:
        offset = damaged.index["x0_offset"][line["sample"]]
        assert f".tar is damaged at byte {offset}: the checksum is wrong" in line["reason"]


@pytest.mark.parametrize("crop_frames", [CROP, FRAMES])
@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("threads", [0, 2])
def test_reads_that_are_planned_ahead_give_the_same_batches(damaged, other_set, crop_frames, in_memory, threads):
    damaged.index_in_memory = in_memory
    sets = damaged if crop_frames == FRAMES else {damaged: 2, other_set: 1}
    stream = LatentStream(sets, crop_frames=crop_frames, global_batch=12, seed=5, max_damaged=1.0)
    batches = stream.iterate(24, rank=1, world_size=2, parts=2, threads=threads)
    for step, batch in enumerate(islice(batches, 80)):
        assert_equal(batch, stream.batch(24 + 12 * (step // 2), rank=1, world_size=2, part=step % 2, parts=2))
    batches.close()


def test_too_much_damage_stops_the_run(damaged):
    stream = LatentStream(damaged, crop_frames=CROP, global_batch=SAMPLES, seed=5, max_damaged=2 / SAMPLES)
    with pytest.raises(
        ValueError, match=r"3 of 23 samples .* can't be read, which exceeds the fraction data.max_damaged=0.0869"
    ):
        stream.batch(0)


def test_what_all_ranks_and_runs_found_counts(damaged, shard_set, tmp_path):
    """No rank meets all three, and each sample is named once, also after a line that was cut off."""
    path = tmp_path / "data_errors.jsonl"
    options = {"crop_frames": CROP, "global_batch": 24, "seed": 5, "errors": path}

    def rank(number: int, **more) -> None:
        LatentStream(damaged, **options, **more).batch(0, rank=number, world_size=24)

    for _ in range(2):
        for number in range(24):
            rank(number, max_damaged=1)
        path.write_text(path.read_text() + '{"set": "cut o')
    lines = path.read_text().splitlines()
    assert sorted(json.loads(line)["sample"] for line in lines if line.endswith("}")) == [3, 4, 11]
    for number in range(24):
        ids = LatentStream(damaged, **options, max_damaged=1).batch(0, rank=number, world_size=24).ids
        sound = LatentStream(shard_set, **options).batch(0, rank=number, world_size=24).ids
        with nullcontext() if ids == sound else pytest.raises(ValueError, match=rf"3 of 23 samples.*remove {path}"):
            rank(number, max_damaged=2 / SAMPLES)


def test_threads_name_a_sample_once(damaged, tmp_path):
    path = tmp_path / "data_errors.jsonl"
    stream = LatentStream(damaged, crop_frames=CROP, global_batch=24, seed=5, errors=path, max_damaged=1)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(stream.batch, [24 * step for step in range(64)]))
    assert sorted(json.loads(line)["sample"] for line in path.read_text().splitlines()) == [3, 4, 11]


def test_a_set_of_damage_alone_is_an_error_not_a_search_for_ever(shard_set, tmp_path):
    folder = shutil.copytree(shard_set.folder, tmp_path / "damaged")
    damage(ShardSet(folder), list(range(SAMPLES)))
    stream = LatentStream(ShardSet(folder), crop_frames=CROP, global_batch=4, seed=5, max_damaged=1)
    with pytest.raises(ValueError, match=r"64 consecutive samples"):
        stream.batch(0)


# ---- several sets


@pytest.fixture(scope="module")
def other_set(tmp_path_factory) -> ShardSet:
    """Seven clips of two lengths; of sample n, frame t, all channels hold -1 - n - t/64."""
    return write_set(tmp_path_factory.mktemp("other"), [(-1 - n, -1, 13 + n % 2) for n in range(7)])


def test_sets_are_mixed_exactly_and_each_in_its_own_order(shard_set, other_set):
    stream = LatentStream({shard_set: 3, other_set: 1}, crop_frames=CROP, global_batch=64, seed=5)
    batches = [stream.batch(seen) for seen in range(0, 64 * 24, 64)]
    assert all(torch.bincount(batch.sets).tolist() == [48, 16] for batch in batches)
    whole = joined(batches)
    for number, (of, share) in enumerate([(shard_set, 3), (other_set, 1)]):
        ids = whole.ids[whole.sets == number]
        assert len(ids) == 64 * 24 * share // 4
        full = len(ids) // len(of)
        counts = torch.bincount(ids, minlength=len(of))
        assert (counts - full).abs().max() <= 1
    value = torch.where(whole.sets == 0, whole.ids, -1 - whole.ids)[:, None]
    step = torch.where(whole.sets == 0, 1, -1)[:, None] / 64
    begin = (whole.x0[:, 0, :1].float() - value) / step
    assert torch.equal(begin.round(), begin)
    expected = value + step * (begin + torch.arange(CROP))
    torch.testing.assert_close(whole.x0[:, 1].float(), expected, rtol=0, atol=0)
    assert (begin[whole.sets == 1] <= 2).all()


def test_a_mixture_is_the_same_however_it_is_cut(shard_set, other_set):
    stream = LatentStream({shard_set: 2, other_set: 1}, crop_frames=CROP, global_batch=12, seed=5)
    cuts = [stream.batch(24, rank=rank, world_size=3, part=part, parts=2) for rank in range(3) for part in range(2)]
    assert_equal(joined(cuts), stream.batch(24))


def test_sets_of_two_autoencoders_are_refused(shard_set, tmp_path):
    other = write_set(tmp_path, [(0, 1, FRAMES)], identity="another")
    with pytest.raises(ValueError, match="two autoencoders"):
        LatentStream({shard_set: 1, other: 1}, crop_frames=CROP, global_batch=12, seed=5)


# ---- any machine, any interruption


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_an_epoch_is_exact_for_any_world_and_any_crash(shard_set, data):
    """Every id once, whatever the ranks, threads and parts, before and after a restore under others."""
    worlds = [(1, 1), (2, 1), (1, 3), (3, 2), (6, 2), (4, 3), (12, 1)]
    kind = data.draw(st.sampled_from(["windowed", "global", "none"]))
    shuffle = Shuffle(kind, block=data.draw(st.integers(1, 4)), window=64, lanes=data.draw(st.sampled_from([1, 2, 12])))
    steps, crash = SAMPLES, data.draw(st.integers(0, SAMPLES))  # 23 batches of 12: twelve epochs
    undisturbed = LatentStream(shard_set, crop_frames=CROP, global_batch=12, seed=5, shuffle=shuffle)
    parts = []
    for first, last in ((0, crash), (crash, steps)):
        (world_size, cuts), threads = data.draw(st.sampled_from(worlds)), data.draw(st.integers(1, 3))
        stream = LatentStream(shard_set, crop_frames=CROP, global_batch=12, seed=5, shuffle=shuffle)
        for rank in range(world_size):
            batches = stream.iterate(first * 12, rank=rank, world_size=world_size, parts=cuts, threads=threads)
            for batch in islice(batches, (last - first) * cuts):
                parts.append(dataclasses.replace(batch, x0=batch.x0.clone()))
            batches.close()
    whole = joined(parts)
    assert torch.equal(whole.positions, torch.arange(12 * steps))
    assert torch.bincount(whole.ids).tolist() == [12] * SAMPLES
    assert_equal(whole, joined([undisturbed.batch(seen) for seen in range(0, 12 * steps, 12)]))


def test_the_stream_never_changes(stream):
    """Runs under way depend on these numbers."""
    batch = LatentStream(stream.sets[0], crop_frames=CROP, global_batch=6, seed=1).batch(600)
    assert batch.ids.tolist() == [6, 12, 9, 22, 4, 19]
    assert starts(batch).tolist() == [12, 12, 0, 10, 7, 10]
