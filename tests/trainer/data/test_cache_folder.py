"""On a shared node, another user's folders, links and files in the cache's place are neither followed nor changed."""

from __future__ import annotations

import os
import random
import stat
from pathlib import Path

import pytest

from tests.trainer.data.test_remote import write_set
from trainer.data import cache_folder
from trainer.data.remote import CacheSettings
from trainer.data.shard_set import ShardSet, open_set

NAME = "spresso-me"


@pytest.fixture(autouse=True)
def shared(tmp_path, monkeypatch) -> Path:
    """A folder for temporary files that everybody may write to, and a user with a name."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    folder.chmod(0o1777)
    monkeypatch.setenv("SLURM_TMPDIR", str(folder))
    monkeypatch.setenv("LOGNAME", "me")
    return folder


@pytest.fixture
def url(tmp_path) -> str:
    write_set(tmp_path / "data")
    return f"file://{tmp_path}/data"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("mask", [0o000, 0o002, 0o022])
def test_the_default_folder_is_this_user_s_alone(shared, url, mask):
    before = os.umask(mask)
    try:
        remote = open_set(url)
        remote.fetch(0)
    finally:
        os.umask(before)
    assert [mode(shared / NAME), mode(remote.folder)] == [0o700, 0o700]
    assert {mode(path) & 0o077 for path in remote.folder.glob("*.tar")} == {0}
    assert list(shared.iterdir()) == [shared / NAME]


def test_a_named_folder_that_others_write_to_gets_one_of_ours(shared, url):
    assert open_set(url, CacheSettings(str(shared))).folder.parent == shared / NAME


def test_a_named_folder_of_ours_is_taken_as_it_is(tmp_path, url):
    (tmp_path / "mine").mkdir(0o755)
    (tmp_path / "link").symlink_to("mine")
    assert open_set(url, CacheSettings(str(tmp_path / "link"))).folder.parent == tmp_path / "link"
    assert mode(tmp_path / "mine") == 0o755


def test_an_older_folder_of_ours_is_closed_to_others(shared, url):
    (shared / NAME).mkdir()
    (shared / NAME).chmod(0o775)
    open_set(url)
    assert mode(shared / NAME) == 0o700


def test_a_user_without_a_name_has_a_folder(monkeypatch):
    def nameless() -> str:
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr("getpass.getuser", nameless)
    assert cache_folder.own_name() == f"spresso-{os.getuid()}"


def test_another_user_s_folder_is_refused(shared, url, monkeypatch):
    open_set(url)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(ValueError, match=rf"{NAME} belongs to another user.*data.cache.folder"):
        open_set(url)


@pytest.mark.parametrize("plant", [Path.touch, os.mkfifo])
def test_what_is_no_folder_is_refused(shared, url, plant):
    plant(shared / NAME)
    with pytest.raises(ValueError, match=f"{NAME} is .*, not a folder"):
        open_set(url)


def test_links_are_followed_nowhere(tmp_path, shared, url):
    """Another user has planted links at random places of a cache; his files and ours behind them stay as they are."""
    own = ShardSet(tmp_path / "data")
    valuable = tmp_path / "valuable"
    for seed in range(30):
        chance = random.Random(seed)
        valuable.write_text("mine")
        names = chance.choice((NAME, "lock", "set", "index.npy", "00000.tar", "part"))
        remote = open_set(url)
        remote.fetch(0)
        places = {
            NAME: shared / NAME,
            "lock": shared / NAME / "lock",
            "set": remote.folder,
            "index.npy": remote.folder / "index.npy",
            "00000.tar": remote.folder / "00000.tar",
            "part": remote.folder / f"00001.tar.{own.shards[1][1]}.part",
        }
        planted = places[names]
        if planted.exists():
            planted.rename(tmp_path / f"kept_{seed}")
        planted.symlink_to(chance.choice((valuable, tmp_path / "nowhere", tmp_path)))
        with pytest.raises(ValueError, match=f"{planted.name}.*is a link"):
            _ = [open_set(url).fetch(shard) for shard in (0, 1)]
        assert valuable.read_text() == "mine"
        assert not (tmp_path / "nowhere").exists()
        planted.unlink()


def test_only_folders_of_sets_are_evicted_from(tmp_path, url):
    """A cache may lie in a folder with other folders of tars, which a full cache once removed."""
    other, small = tmp_path / "cache" / "recordings", CacheSettings(str(tmp_path / "cache"), gib=250_000 / 2**30)
    other.mkdir(parents=True)
    (other / "a.tar").write_bytes(bytes(200_000))
    (tmp_path / "cache").chmod(0o700)
    remote = open_set(url, small)
    for shard in range(6):
        remote.fetch(shard)
    assert (other / "a.tar").exists()
    assert 0 < len(list(remote.folder.glob("*.tar"))) < 3


@pytest.mark.parametrize("damage", ["another index", "a byte"])
def test_a_cached_index_that_is_not_the_set_s_is_refused(tmp_path, url, damage):
    index = open_set(url).folder / "index.npy"
    content = bytearray(index.read_bytes())
    content[-30] ^= 1
    if damage == "another index":
        content = (write_set(tmp_path / "other", seed=1).folder / "index.npy").read_bytes()
    index.write_bytes(content)
    with pytest.raises(
        ValueError,
        match=r"index.npy does not match set.json: remove \S*/spresso-me/",
    ):
        open_set(url)
