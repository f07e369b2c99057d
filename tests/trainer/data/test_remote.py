from __future__ import annotations

import io
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from launch import pipeline
from tests.nginx import Nginx
from trainer.data.fetch_ahead import FetchAhead
from trainer.data.remote import CacheSettings, MissingFileError, Remote, ShardCache
from trainer.data.shard_set import ShardSet, open_set
from trainer.data.shards import DamagedSample, SetInfo, ShardWriter, scan_shard, write_index
from trainer.data.stream import LatentStream, Shuffle
from trainer.stage_inputs import training_sets

CHANNELS, FRAMES, SAMPLES = 16, 40, 600
SHARD = 100_000  # bytes at most: 10 shards
FORK = multiprocessing.get_context("forkserver")


def write_set(folder: Path, seed: int = 0) -> ShardSet:
    random = np.random.default_rng(seed)
    with ShardWriter(folder, max_bytes=SHARD) as writer:
        for number in range(SAMPLES):
            writer.write(f"s{number:04d}", random.normal(size=(CHANNELS, FRAMES)).astype(np.float16), {"n": number})
    info = SetInfo("a", {}, sample_rate=8000, hop=80, latent_channels=CHANNELS, clip_seconds=0.4)
    write_index(folder, info, {name: scan_shard(folder / name) for name in writer.names})
    return ShardSet(folder)


@pytest.fixture
def local(tmp_path: Path) -> ShardSet:
    return write_set(tmp_path / "data/set")


@pytest.fixture
def server(local: ShardSet, tmp_path: Path) -> Iterator[Nginx]:
    with Nginx(tmp_path / "data", tmp_path / "nginx", slow=50_000) as nginx:
        yield nginx


@pytest.fixture
def cache(tmp_path: Path) -> CacheSettings:
    return CacheSettings(str(tmp_path / "cache"), gib=1, patience=30)


def stream(shard_set: ShardSet, **options) -> LatentStream:
    return LatentStream(
        shard_set, crop_frames=32, global_batch=24, seed=3, shuffle=Shuffle(block=8, window=80, lanes=2), **options
    )


def first_batches(shard_set: ShardSet, count: int = 25, **options) -> list[torch.Tensor]:
    batches = stream(shard_set, **options).iterate(0)
    taken = [batch.x0.clone() for batch in islice(batches, count)]
    batches.close()
    return taken


def assert_equal(some: list[torch.Tensor], others: list[torch.Tensor]) -> None:
    assert all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


def cached_bytes(cache: CacheSettings) -> int:
    """What lies in the cache's shards on the disk."""
    total = 0
    for path in cache.path.glob("*/*.tar*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # just evicted or renamed
            continue
    return total


def test_a_remote_set_gives_the_same_batches_and_fetches_each_shard_once(local, server, cache):
    remote = open_set(f"{server.url}/plain/set", cache)
    assert remote.fingerprint == local.fingerprint
    assert_equal(first_batches(remote), first_batches(local))
    assert [server.requests(path.name) for path in local.paths] == [1] * len(local.paths)
    assert remote.metadata(17) == {"n": 17}
    assert_equal(first_batches(open_set(f"{server.url}/plain/set/", cache)), first_batches(local))
    assert [server.requests(path.name) for path in local.paths] == [1] * len(local.paths)


@pytest.mark.parametrize("kind", ["flaky", "slow", "whole"])
def test_a_bad_server_gives_the_same_batches(local, server, cache, kind):
    assert_equal(first_batches(open_set(f"{server.url}/{kind}/set", cache), 3), first_batches(local, 3))


def test_a_server_that_is_cut_off_is_waited_for(local, server, cache):
    remote = open_set(f"{server.url}/slow/set", cache)
    found: list[list[torch.Tensor]] = []
    reading = threading.Thread(target=lambda: found.append(first_batches(remote, 5)))
    reading.start()
    time.sleep(0.5)
    server.cut_off()
    time.sleep(1)
    assert not found
    server.start()
    reading.join()
    assert_equal(found[0], first_batches(local, 5))


def test_a_fetch_goes_on_where_it_ended(local, server, tmp_path):
    path = local.paths[0]
    content = path.read_bytes()
    begun = tmp_path / "begun"
    begun.write_bytes(content[:70_000])
    with io.FileIO(begun, "ab+") as file:
        Remote(f"{server.url}/plain/set", patience=5).append(path.name, file, len(content))
    assert begun.read_bytes() == content
    assert server.logged(f" 206 {len(content) - 70_000} ")


def fetch_all(url: str, cache: CacheSettings, seed: int, out: Path) -> None:
    """In a process of its own: read every sample, in an order of its own."""
    remote = open_set(url, cache)
    for id_ in np.random.default_rng(seed).permutation(SAMPLES)[:200].tolist():
        assert remote.metadata(id_) == {"n": id_}
    x0 = remote.latents(range(SAMPLES))
    out.write_bytes(np.stack(x0).tobytes())


def run_four(url: str, cache: CacheSettings, folder: Path) -> list[bytes]:
    outs = [folder / f"out{seed}" for seed in range(4)]
    processes = [
        FORK.Process(target=fetch_all, args=(url, cache, seed, out), daemon=True) for seed, out in enumerate(outs)
    ]
    for process in processes:
        process.start()
    most = 0
    while any(process.is_alive() for process in processes):
        most = max(most, cached_bytes(cache))
        time.sleep(0.001)
    assert [process.exitcode for process in processes] == [0] * 4
    assert 0 < most <= cache.limit
    return [out.read_bytes() for out in outs]


def test_four_processes_fetch_each_shard_once(local, server, cache, tmp_path):
    everything = np.stack(local.latents(range(SAMPLES))).tobytes()
    assert run_four(f"{server.url}/plain/set", cache, tmp_path) == [everything] * 4
    assert [server.requests(path.name) for path in local.paths] == [1] * len(local.paths)
    assert server.requests("index.npy") == 5  # four processes ask for its size, one for its content


def test_four_processes_stay_under_the_limit(local, server, cache, tmp_path):
    small = CacheSettings(cache.folder, gib=2.5 * SHARD / 2**30, patience=30)
    everything = np.stack(local.latents(range(SAMPLES))).tobytes()
    assert run_four(f"{server.url}/plain/set", small, tmp_path) == [everything] * 4
    assert sum(server.requests(path.name) for path in local.paths) > len(local.paths)


def fetch_one(url: str, cache: CacheSettings) -> None:
    open_set(url, cache).fetch(0)


def test_what_a_killed_process_began_is_continued(local, server, cache):
    fetching = FORK.Process(target=fetch_one, args=(f"{server.url}/slow/set", cache), daemon=True)
    fetching.start()
    deadline = time.monotonic() + 120
    while not list(cache.path.glob("*/00000.tar.*.part")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(fetching.pid, signal.SIGKILL)
    fetching.join()
    remote = open_set(f"{server.url}/slow/set", cache)
    part = next(cache.path.glob("*/00000.tar.*.part"))
    part.write_bytes(local.paths[0].read_bytes()[:60_000])
    remote.fetch(0)
    assert not part.exists()
    assert (remote.folder / "00000.tar").read_bytes() == local.paths[0].read_bytes()
    assert server.logged(f" 206 {local.paths[0].stat().st_size - 60_000} ")


def test_another_set_at_the_same_place_is_not_mixed_with_the_old(local, server, cache, tmp_path):
    first_batches(open_set(f"{server.url}/plain/set", cache), 3)
    shutil.rmtree(tmp_path / "data/set")
    other = write_set(tmp_path / "data/set", seed=1)
    assert_equal(first_batches(open_set(f"{server.url}/plain/set", cache), 3), first_batches(other, 3))


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_a_damaged_remote_shard_is_replaced_and_named(local, server, cache, tmp_path, damage):
    path = local.paths[3]
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[int(local.index[local.index["shard"] == 3]["x0_offset"][5]) + 7] ^= 1
        path.write_bytes(content)
    errors = tmp_path / "data_errors.jsonl"
    remote = open_set(f"{server.url}/plain/set", cache)
    found = first_batches(remote, errors=errors, max_damaged=0.2)
    damaged = [json.loads(line) for line in errors.read_text().splitlines()]
    assert {remote.index["shard"][line["sample"]] for line in damaged} == {3}
    assert len(damaged) == (1 if damage == "flipped" else (remote.index["shard"] == 3).sum())
    assert all(f"{server.url}/plain/set/{path.name}" in line["reason"] for line in damaged)
    if damage == "flipped":  # the same as where the damage is local
        assert_equal(found, first_batches(local))
    with pytest.raises(ValueError, match="max_damaged"):
        first_batches(remote, max_damaged=0.001)


def test_metadata_of_a_missing_or_damaged_remote_shard_is_told(local, server, cache):
    remote = open_set(f"{server.url}/plain/set", cache)
    first, last = local.paths[0], local.paths[-1]
    offset = int(local.index["json_offset"][0])
    content = bytearray(first.read_bytes())
    content[offset] = ord("[")
    first.write_bytes(content)
    with pytest.raises(
        DamagedSample, match=f"/plain/set/{first.name} is damaged at byte {offset}: s0000.json does not have"
    ):
        remote.metadata(0)
    last.unlink()
    with pytest.raises(DamagedSample, match=f"/plain/set/{last.name} is missing"):
        remote.metadata(SAMPLES - 1)


def test_what_waiting_does_not_mend_is_told_at_once(server, cache):
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"set\.json is missing: give the URL"):
        open_set(f"{server.url}/plain/nothing", cache)
    with pytest.raises(ValueError, match=r"access to .*/set\.json is denied"):
        open_set(f"{server.url}/forbidden/set", cache)
    with pytest.raises(ValueError, match="can't be opened"):
        open_set("nonsense://bucket/set", cache)
    assert time.monotonic() - start < 5


def test_a_size_that_could_not_be_asked_for_is_asked_again(local, server):
    flaky = Remote(f"{server.url}/flaky/set", patience=30)
    assert {flaky.size("index.npy") for _ in range(12)} == {(local.folder / "index.npy").stat().st_size}
    with pytest.raises(ValueError, match="could not be fetched for 1 s"):
        Remote(f"{server.url}/down/set", patience=1).size("index.npy")
    with pytest.raises(MissingFileError):
        Remote(f"{server.url}/plain/set", patience=30).size("nothing.npy")


def test_patience_ends(server, cache):
    with pytest.raises(ValueError, match=r"could not be fetched for 1 s; the last error was ClientResponseError 503"):
        open_set(f"{server.url}/down/set", CacheSettings(cache.folder, patience=1))


def test_a_shard_larger_than_the_cache_is_refused(server, cache):
    remote = open_set(f"{server.url}/plain/set", CacheSettings(cache.folder, gib=SHARD / 2**31))
    with pytest.raises(ValueError, match=r"more than data\.cache\.gib"):
        remote.latents([0])


def test_a_full_disk_is_told_of(server, cache, monkeypatch):
    remote = open_set(f"{server.url}/plain/set", cache)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Remote, "append", full)
    with pytest.raises(ValueError, match=r"No space left on device; give another data\.cache\.folder"):
        remote.latents([0])


def test_a_set_names_no_file_outside_of_its_folder(local, server, cache):
    description = json.loads((local.folder / "set.json").read_text())
    description["shards"][0]["name"] = "../00000.tar"
    (local.folder / "set.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match="outside of the set's folder"):
        open_set(f"{server.url}/plain/set", cache)


def test_shards_are_fetched_before_they_are_needed(local, server, cache):
    remote = open_set(f"{server.url}/plain/set", cache)
    batches = stream(remote).iterate(0)
    next(batches)
    deadline = time.monotonic() + 20
    while len(list(remote.folder.glob("*.tar"))) < len(local.paths) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(list(remote.folder.glob("*.tar"))) == len(local.paths)
    batches.close()


def test_closing_does_not_wait_for_a_network_that_is_away(local, server, cache):
    remote = open_set(f"{server.url}/plain/set", cache)
    batches = stream(remote).iterate(0)
    next(batches)
    small = CacheSettings(cache.folder, gib=1, patience=300)
    remote = open_set(f"{server.url}/slow/set", small)
    batches = stream(remote).iterate(0)
    next(batches)
    server.cut_off()
    time.sleep(0.5)
    start = time.monotonic()
    batches.close()
    assert time.monotonic() - start < 10
    server.start()
    assert_equal(first_batches(remote, 3), first_batches(local, 3))  # and the set is as good as before


class FakeSet:
    def __init__(self) -> None:
        self.fetched: list[int] = []

    def fetch(self, shard: int) -> None:
        self.fetched.append(shard)


def test_fetching_keeps_to_the_order_and_to_its_share():
    fake = FakeSet()
    steps = [[0, 1], [1, 2], [3], [4], [0], [5], *([n] for n in range(6, 1000))]
    needs = ({(fake, shard): 10 for shard in step} for step in steps)
    with FetchAhead(needs, share=35, fetchers=1) as ahead:
        ahead.to(0)
        ahead._pool.submit(int).result()
        assert fake.fetched == [0, 1, 2, 3]  # 40 bytes: what makes it full is fetched too
        ahead.to(1)  # 0 is not needed again yet: its 10 bytes count no more
        ahead._pool.submit(int).result()
        assert fake.fetched == [0, 1, 2, 3, 4]
        for step in range(2, 101):
            ahead.to(step)
        ahead._pool.submit(int).result()
        assert fake.fetched[:7] == [0, 1, 2, 3, 4, 0, 5]
        assert fake.fetched[-4:] == [100, 101, 102, 103]


def test_a_missing_file_is_not_waited_for(server, tmp_path):
    with io.FileIO(tmp_path / "file", "ab+") as file, pytest.raises(MissingFileError, match="is missing"):
        Remote(f"{server.url}/plain/set", patience=60).append("none.tar", file, 100)


def test_other_filesystems(local, cache):
    """Whatever fsspec opens; an S3 or GCS bucket is one more of them."""
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(local.folder), "/bucket/set", recursive=True)
    assert_equal(first_batches(open_set("memory://bucket/set", cache)), first_batches(local))
    assert ShardCache("memory://bucket/set", cache).folder.is_dir()


def weights_of(run: Path) -> bytes:
    return (run / "pretrain/export/dit.safetensors").read_bytes()


def test_a_stage_learns_the_same_from_a_url_on_two_ranks(prepared, tiny, tmp_path):
    remote = ["data.audio=null", f"data.cache.folder={tmp_path / 'cache'}", "parallel.processes=2"]
    assert pipeline.run_stage(tiny("parallel.processes=2", run_dir=tmp_path / "here"), "pretrain") == "done"
    with Nginx(prepared, tmp_path / "nginx") as nginx:
        url = f"data.latents={nginx.url}/flaky/latents"
        assert pipeline.run_stage(tiny(url, *remote, run_dir=tmp_path / "far"), "pretrain") == "done"
        assert weights_of(tmp_path / "far") == weights_of(tmp_path / "here")

        # a set that is not parted into train/ and test/
        mix = f"data.mix={{'{nginx.url}/plain/latents/train': 1}}"
        assert pipeline.run_stage(tiny(mix, *remote[1:], run_dir=tmp_path / "mixed"), "pretrain") == "done"
        assert weights_of(tmp_path / "mixed") == weights_of(tmp_path / "here")


def test_a_set_itself_is_learned_from_but_has_nothing_held_out(prepared, tiny):
    train = prepared / "latents/train"
    (learned_from,) = training_sets(tiny(f"data.mix={{{train}: 1}}"))
    assert learned_from.location == str(train)
    with pytest.raises(ValueError, match=r"holds shards itself: move them to its train/"):
        tiny(f"data.latents={train}", "data.audio=null")
