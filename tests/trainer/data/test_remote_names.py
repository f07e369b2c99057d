"""Names of remote shards: each is asked for as it is, whatever it would mean in a URL."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.nginx import Nginx
from tests.trainer.data.test_remote import assert_equal, first_batches, write_set
from trainer.data.remote import CacheSettings, MissingFileError, Remote
from trainer.data.shard_set import ShardSet, open_set
from trainer.data.shards import scan_shard, write_index

NAMES = (
    "50%.tar",
    "a%23b.tar",
    "a#b.tar",
    "a?b=c.tar",
    "a b+c&d.tar",
    "a\nb.tar",
    "ünï→.tar",
    "%0A;'\"<>.tar",
    "::[x].tar",
)


@pytest.fixture
def odd(tmp_path: Path) -> ShardSet:
    """A set whose shards have odd names."""
    plain = write_set(tmp_path / "plain")
    folder = tmp_path / "data" / "a set"
    folder.mkdir(parents=True)
    names = [*NAMES, *(f"{number}.tar" for number in range(len(plain.paths) - len(NAMES)))]
    for path, name in zip(plain.paths, names, strict=True):
        shutil.copyfile(path, folder / name)
    write_index(folder, plain.info, {name: scan_shard(folder / name) for name in names})
    return ShardSet(folder)


def test_shards_of_any_name_are_fetched(odd: ShardSet, tmp_path: Path):
    cache = CacheSettings(str(tmp_path / "cache"), gib=1, patience=5)
    with Nginx(tmp_path / "data", tmp_path / "nginx") as nginx:
        remote = open_set(f"{nginx.url}/plain/a%20set", cache)
        assert_equal(first_batches(remote), first_batches(odd))
        for name in ("50%25.tar", "a%2523b.tar", "a%23b.tar", "a%3Fb", "a%0Ab.tar", "%250A"):
            assert nginx.logged(f'"GET /plain/a%20set/{name}')


def test_other_filesystems_take_names_as_they_are(odd: ShardSet, tmp_path: Path):
    import fsspec

    fsspec.filesystem("memory").put(str(odd.folder), "/odd/set", recursive=True)
    remote = open_set("memory://odd/set", CacheSettings(str(tmp_path / "cache"), gib=1, patience=5))
    assert_equal(first_batches(remote, 3), first_batches(odd, 3))


def test_a_missing_name_is_told_on_one_line(odd: ShardSet, tmp_path: Path):
    with Nginx(tmp_path / "data", tmp_path / "nginx") as nginx, pytest.raises(MissingFileError) as error:
        Remote(f"{nginx.url}/plain", patience=5).content("no\n\x1b[2Jne.tar", most=100)
    assert str(error.value) == rf"{nginx.url}/plain/no\x0a\x1b[2Jne.tar is missing"


def test_a_url_that_its_own_sign_cuts_off_is_refused():
    with pytest.raises(ValueError, match="write %23"):
        Remote("https://a.b/Pack #2/train", patience=1)
