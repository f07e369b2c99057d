"""A disk that fails while shards are read is no damaged sample: it is tried again, then the run stops."""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager

import numpy as np
import pytest

from tests.trainer.data.test_shards import SAMPLES, latents, write_set
from trainer.data import index, index_file
from trainer.data import shard_set as shard_set_module
from trainer.data.remote import CacheSettings, ShardCache
from trainer.data.shard_set import open_set
from trainer.data.stream import LatentStream
from trainer.data.text_embeddings import TextFiles

NUMBERS = [errno.EIO, errno.EACCES, errno.ESTALE, errno.EMFILE, errno.ENFILE]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(shard_set_module, "_PAUSES", (0.0, 0.0, 0.0))


@pytest.fixture
def shards(tmp_path):
    return write_set(tmp_path / "set", with_audio=True, max_bytes=60_000)


def failing(monkeypatch, call: str, number: int, *, times: float) -> list[int]:
    """Let the first `times` calls of a function of `os` fail; returns a list that grows with each call."""
    real, calls = getattr(os, call), []

    def fail(*arguments):
        calls.append(number)
        if len(calls) <= times:
            raise OSError(number, os.strerror(number))
        return real(*arguments)

    monkeypatch.setattr(os, call, fail)
    return calls


def stream(shards, **options) -> LatentStream:
    return LatentStream(shards, crop_frames=5, global_batch=8, seed=3, max_damaged=1.0, **options)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_passing_failure_changes_nothing(shards, tmp_path, monkeypatch, number):
    expected = stream(shards).batch(0)
    calls = failing(monkeypatch, "preadv", number, times=3)
    found = stream(shards, errors=tmp_path / "data_errors.jsonl").batch(0)
    assert len(calls) > 3
    assert found.ids.tolist() == expected.ids.tolist()
    assert found.x0.equal(expected.x0)
    assert not (tmp_path / "data_errors.jsonl").exists()


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_lasting_failure_stops_the_rank_and_replaces_nothing(shards, tmp_path, monkeypatch, number, rank):
    failing(monkeypatch, "preadv", number, times=float("inf"))
    with pytest.raises(OSError, match=r"\.tar .*No sample is replaced for that: repeat the command") as error:
        stream(shards, errors=tmp_path / "data_errors.jsonl").batch(0, rank=rank, world_size=2)
    assert error.value.errno == number
    assert "\n" not in str(error.value)
    assert not (tmp_path / "data_errors.jsonl").exists()


def test_an_error_that_no_waiting_mends_is_not_waited_for(shards, monkeypatch):
    calls = failing(monkeypatch, "pread", errno.EPERM, times=float("inf"))
    with pytest.raises(OSError, match="permission denied"):
        shards.audio(0)
    assert len(calls) == 1


def test_audio_and_metadata_are_tried_again(shards, monkeypatch):
    expected = shards.audio(4)
    failing(monkeypatch, "pread", errno.EIO, times=2)
    np.testing.assert_array_equal(shards.audio(4), expected)
    failing(monkeypatch, "pread", errno.EIO, times=2)
    assert shards.metadata(4) == {"caption": "Tür 4"}
    failing(monkeypatch, "pread", errno.EIO, times=float("inf"))
    with pytest.raises(OSError, match="input/output error"):
        shards.metadata(4)


def test_a_shard_whose_server_went_away_is_opened_again(shards, monkeypatch):
    """A file handle that is stale stays so, however often it is read."""
    real, stale = os.preadv, set()

    def read(descriptor, *arguments):
        if descriptor in stale:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return real(descriptor, *arguments)

    ids = np.arange(SAMPLES)
    shards.latents(ids)  # opens all shards
    held = [shards._open(number) for number in range(len(shards.shards))]
    stale |= {file.fileno() for file in held}
    monkeypatch.setattr(os, "preadv", read)
    for id_, read_again in zip(ids, shards.latents(ids), strict=True):
        np.testing.assert_array_equal(read_again, latents(id_))


def test_a_shard_that_was_removed_is_damage(shards):
    shards.paths[1].unlink()
    id_ = int(np.flatnonzero(shards.index["shard"] == 1)[0])
    values = np.empty((1, 6 * 11), np.float16)
    assert list(shards.read(np.array([id_]), values)) == [0]


@pytest.mark.parametrize("number", NUMBERS)
def test_an_embedding_that_can_not_be_read_now_is_no_bad_one(tmp_path, monkeypatch, number):
    np.save(tmp_path / "a.npy", np.zeros((2, 3), np.float32))
    files = TextFiles(tmp_path, tokens=4)
    with monkeypatch.context() as patch:
        failing(patch, "open", number, times=float("inf"))
        with pytest.raises(OSError, match=r".") as error:
            files.embed("a.wav", "")
    assert error.value.errno == number
    failing(monkeypatch, "open", number, times=2)
    assert files.embed("a.wav", "").shape == (2, 3)


def test_an_embedding_that_is_no_array_is_a_bad_one(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((2, 3), np.float32))
    files = TextFiles(tmp_path, tokens=4)
    for content in (b"", b"PK\x03\x04 no zip", b"nothing"):
        (tmp_path / "a.npy").write_bytes(content)
        with pytest.raises(ValueError, match=r"not a complete \.npy"):
            files.embed("a.wav", "")


def test_verifying_does_not_call_a_failing_disk_damage(shards, monkeypatch):
    def fail(path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(index, "find_members", fail)
    told = index.verify_folder(shards.folder)
    assert len(told) == len(shards.shards)
    assert all("can't be read now, which is no sign of damage" in line for line in told)


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.EIO, OSError), (errno.EMFILE, OSError), (errno.EDQUOT, ValueError)]
)
def test_a_cache_on_a_failing_disk_is_told_from_a_full_one(tmp_path, monkeypatch, number, kind):
    def fail(*arguments) -> None:
        raise OSError(number, os.strerror(number))

    cache = ShardCache.__new__(ShardCache)
    cache._all_sets, cache.settings = tmp_path, CacheSettings()
    with pytest.raises(kind, match=r"the cache .* can't be written") as error, cache._disk_errors_explained():
        fail()
    assert getattr(error.value, "errno", None) == (number if kind is OSError else None)


class FailingFile:
    """An open file whose content can't be read."""

    def __init__(self, file, number: int) -> None:
        self.file, self.number = file, number

    def seek(self, place: int) -> int:
        return self.file.seek(place)

    def read(self, count: int) -> bytes:
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize("number", NUMBERS)
def test_an_index_that_can_not_be_read_is_an_error_of_the_disk(shards, monkeypatch, number):
    real = index_file.opened

    @contextmanager
    def opened(path):
        with real(path) as file:
            yield FailingFile(file, number)

    monkeypatch.setattr(index_file, "opened", opened)
    with pytest.raises(OSError, match=r"index\.npy") as error:
        open_set(str(shards.folder))
    assert error.value.errno == number


def test_an_index_is_read_whole_unless_it_is_large(shards, monkeypatch):
    assert type(shards.index) is np.ndarray
    assert isinstance(shards.index.base, bytes)
    assert not shards.index.flags.writeable
    expected, ids = stream(shards).batch(0), np.arange(len(shards))
    monkeypatch.setattr(shard_set_module, "_MOST_READ", shards.index.nbytes - 1)
    mapped = open_set(str(shards.folder))
    assert isinstance(mapped.index, np.memmap)
    assert (mapped.index == shards.index).all()
    assert stream(mapped).batch(0).x0.equal(expected.x0)
    assert [a.tolist() for a in mapped.latents(ids)] == [b.tolist() for b in shards.latents(ids)]
