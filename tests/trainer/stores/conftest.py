"""The stores that the tests of this folder write to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec.config
import pytest

from tests.stores import ENVIRONMENT, S3, SHORT, Proxy, Server, WebDAV


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3]:
    with S3() as server:
        yield server


@dataclass
class Place:
    """A store for one test."""

    url: str
    proxy: Proxy | None
    server: Server | None


@pytest.fixture
def s3(s3_server: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """An empty bucket behind a proxy."""
    s3_server.reset()
    with Proxy(s3_server) as proxy:
        for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": proxy.url}.items():
            monkeypatch.setenv(name, value)
        _forget_clients()
        yield Place(f"s3://{s3_server.bucket}/runs/a", proxy, s3_server)
        _forget_clients()


@pytest.fixture
def webdav(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """An empty folder of a WebDAV server behind a proxy."""
    (tmp_path / "dav").mkdir()
    with WebDAV(tmp_path / "dav", tmp_path / "nginx") as server, Proxy(server) as proxy:
        monkeypatch.setitem(fsspec.config.conf, "webdav", {"base_url": proxy.url})
        monkeypatch.setenv("FSSPEC_WEBDAV_BASE_URL", proxy.url)
        _forget_clients()
        yield Place("webdav://runs/a", proxy, server)


@pytest.fixture
def disk(tmp_path: Path) -> Place:
    """A folder of another disk."""
    return Place(f"file://{tmp_path / 'disk'}", None, None)


@pytest.fixture(params=["s3", "webdav", "disk"])
def place(request: pytest.FixtureRequest) -> Any:
    """Each kind of store in turn."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def files_of() -> Callable[[Place], dict[str, bytes]]:
    """Return what a store holds: name below its URL → content."""

    def read(place: Place) -> dict[str, bytes]:
        filesystem, root = fsspec.core.url_to_fs(place.url)
        filesystem.invalidate_cache()
        names = [str(name) for name in filesystem.find(root)]
        return {name.lstrip("/").removeprefix(root.lstrip("/") + "/"): filesystem.cat_file(name) for name in names}

    return read


def _forget_clients() -> None:
    """Later clients read the environment anew."""
    for kind in ("s3", "webdav"):
        fsspec.get_filesystem_class(kind).clear_instance_cache()


@pytest.fixture
def on(tiny, tmp_path: Path) -> Callable[..., Any]:
    """Return a function that makes the recipe of a run on a node of its own, with an empty disk."""

    def make(place: Any, node: str, *overrides: str) -> Any:
        return tiny(*SHORT, f"checkpoint.upload={place.url}", *overrides, run_dir=tmp_path / node)

    return make
