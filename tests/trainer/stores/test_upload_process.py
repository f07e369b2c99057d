"""The uploading process: it tries again, says each thing once, follows the newest checkpoint, and never lets go."""

from __future__ import annotations

import itertools
import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.stores import SECRET
from tests.trainer.checkpoints.test_checkpoint import save
from tests.trainer.stores.test_upload import uploader
from trainer.checkpoints.names import folder_name
from trainer.run_directory import stage_folder
from trainer.run_documents import read_upload
from trainer.stop import Stop
from trainer.stores import upload_process, uploads
from trainer.stores.upload_process import Inbox, Request, Worker


class Told:
    """What a worker tells, and when something of a kind has come."""

    def __init__(self) -> None:
        self.facts: list[dict[str, Any]] = []
        self._changed = threading.Condition()

    def __call__(self, **facts: Any) -> None:
        with self._changed:
            self.facts.append(facts)
            self._changed.notify_all()

    def of(self, kind: str) -> list[Any]:
        return [facts[kind] for facts in self.facts if kind in facts]

    def wait(self, kind: str, value: object = None) -> None:
        with self._changed:
            came = self._changed.wait_for(
                lambda: any(value is None or found == value for found in self.of(kind)), timeout=60
            )
        assert came, self.facts


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def start(tmp_path, told, monkeypatch):
    """Return a function that starts a worker for a store; it pauses shortly between two tries."""
    monkeypatch.setattr(upload_process, "_LONGEST_PAUSE", 0.05)

    def begin(place: Any) -> Worker:
        folder = tmp_path / "run" / "pretrain"
        worker = Worker(uploader(place, folder), told)
        threading.Thread(target=worker.serve, daemon=True).start()
        return worker

    return begin


def ask(worker: Worker, number: int, samples: int) -> Path:
    path = save(worker.upload.folder / "checkpoints", samples)
    worker.inbox.put(Request(number, "checkpoint", path.name))
    return path


def test_of_several_that_wait_the_newest_is_uploaded(told):
    inbox = Inbox(lambda request: told(answered=request.number))
    for number in (1, 2, 3):
        inbox.put(Request(number, "checkpoint", folder_name(8 * number)))
    inbox.put(Request(4, "export"))
    assert told.of("answered") == [1, 2]
    assert [inbox.take().number, inbox.take().number] == [3, 4]


@pytest.mark.parametrize("fault", ["500", "503", "403", "cut"])
def test_what_fails_is_tried_until_it_succeeds_and_told_once(s3, start, told, fault):
    """An error of the server, a throttled one, keys that were withdrawn, connections that break."""
    s3.proxy.fault = lambda method, name: fault if method == "PUT" and "rank_" in name else ""
    worker = start(s3)
    ask(worker, 1, 8)
    told.wait("warning")
    while len(s3.proxy.asked(r"PUT .*rank_")) < 3:
        s3.proxy.at_gate.wait(0.01)
    assert len(told.of("warning")) == 1
    assert "\n" not in told.of("warning")[0]
    assert f"{folder_name(8)} is not uploaded yet" in read_upload(worker.upload.folder)["problem"]
    assert not s3.proxy.asked(r"PUT .*manifest")
    s3.proxy.fault = lambda method, name: ""
    told.wait("answered", 1)
    assert s3.proxy.asked(r"PUT .*manifest")
    assert read_upload(worker.upload.folder)["whole"] == folder_name(8)
    assert "problem" not in read_upload(worker.upload.folder)
    assert SECRET not in str(told.facts)


def test_a_server_that_goes_and_comes_back(webdav, start, told):
    webdav.server.kill()
    worker = start(webdav)
    ask(worker, 1, 8)
    told.wait("warning")
    webdav.server.start()
    told.wait("answered", 1)
    assert told.of("info")[-2:] == [
        "webdav://runs/a takes uploads again",
        f"{folder_name(8)} is whole at webdav://runs/a/pretrain",
    ]


def test_what_does_not_move_gives_way_to_a_newer_one(s3, start, told):
    s3.proxy.fault = lambda method, name: "500" if method == "PUT" and f"{folder_name(8)}/rank_" in name else ""
    worker = start(s3)
    ask(worker, 1, 8)
    told.wait("warning")
    ask(worker, 2, 16)
    told.wait("answered", 2)
    assert told.of("answered") == [1, 2]
    assert not s3.proxy.asked(f"PUT .*{folder_name(8)}/manifest")


def test_what_is_gone_from_the_disk_is_let_go(s3, start, told):
    worker = start(s3)
    worker.inbox.put(Request(1, "checkpoint", folder_name(8)))
    told.wait("answered", 1)
    assert told.of("warning") == []


def test_a_refusal_is_final(disk, start, told, tmp_path):
    uploader(disk, tmp_path / "other" / "pretrain", run="b").begin()
    worker = start(disk)
    ask(worker, 1, 8)
    ask(worker, 2, 16)
    told.wait("answered", 2)
    assert len(told.of("warning")) == 1
    assert "holds another run" in told.of("warning")[0]


def test_a_try_that_gets_no_farther_pauses_longer(s3, tmp_path, told, monkeypatch):
    """What is whole on the store counts once: a store that throttles the rest is not asked each second."""
    folder, pauses = tmp_path / "run" / "pretrain", list[float]()
    (folder / "export").mkdir(parents=True)
    for name in ("codec.json", "dit.safetensors"):
        (folder / "export" / name).write_bytes(b"content")
    worker = Worker(uploader(s3, folder), told)
    s3.proxy.fault = lambda method, name: "503" if method == "PUT" and "dit." in name else ""

    def pause(seconds: float) -> bool:
        pauses.append(seconds)
        if len(pauses) == 5:
            s3.proxy.fault = lambda method, name: ""
        return False

    monkeypatch.setattr(worker.inbox, "pause", pause)
    monkeypatch.setattr(upload_process.random, "uniform", lambda low, high: 1.0)
    worker._until_done(Request(1, "export"))
    assert pauses == [1, 2, 4, 8, 16]


def test_the_end_of_a_run_is_not_held_up_by_tries_that_get_no_farther(tiny, monkeypatch):
    """Each try says again how far it is; a store that always refuses the rest would be waited for without end."""
    config, moved, now = tiny("checkpoint.upload=s3://bucket/a"), list[float](), itertools.count(1.0)
    rank_0 = uploads.Uploads(config, "pretrain", Stop(), main=True)
    monkeypatch.setattr(uploads, "time", SimpleNamespace(monotonic=lambda: next(now)))

    def said():
        for sent in (0, 5, 0, 5, 0, 7):
            yield json.dumps({"sending": "export", "sent": sent, "of": 9})
            yield json.dumps({"warning": f"request {sent} is refused"})
            moved.append(rank_0._moved_at)

    rank_0._listen(SimpleNamespace(stdout=said()))
    assert moved == [0, 1, 1, 1, 1, 2]


def test_a_process_that_was_killed_is_replaced_by_one_that_goes_on(disk, tiny):
    config = tiny(f"checkpoint.upload={disk.url}")
    folder = stage_folder(config, "pretrain")
    with uploads.Uploads(config, "pretrain", Stop(), main=True) as rank_0:
        rank_0.begin(0)
        rank_0.checkpoint(save(folder / "checkpoints", 8))
        rank_0._wait()
        rank_0._process.kill()
        rank_0._process.wait()
        rank_0.checkpoint(save(folder / "checkpoints", 16))
    assert read_upload(folder)["whole"] == folder_name(16)
    assert "problem" not in read_upload(folder)
