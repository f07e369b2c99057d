"""`spresso profile`: what it asks for, what it waits for, and when there is nothing to wait for."""

from __future__ import annotations

import time
from pathlib import Path
from threading import Thread

import pytest

from launch import owner
from launch.cli import main
from launch.status import traces as asking
from trainer.log.trace_request import (
    TraceRequest,
    read_request,
    remove_request,
    table_beside,
    trace_folder,
    trace_path,
    write_request,
)


@pytest.fixture
def stage(tmp_path, monkeypatch) -> Path:
    """A stage's directory, in which this process trains as far as its owner says."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SPRESSO_ATTEMPT", raising=False)
    monkeypatch.setattr(asking, "_PAUSE", 0.01)
    monkeypatch.setattr(asking, "_ALIVE", 0.05)
    monkeypatch.setattr(asking, "_PATIENCE", 0.1)
    folder = tmp_path / "runs/mine/autoencode"
    folder.mkdir(parents=True)
    (folder / "status.json").write_text('{"state": "running", "samples": 8, "of": 96}')
    return folder


def answer(stage: Path, *, name: str | None) -> Thread:
    """Play rank 0 in a thread: wait for a request, write a trace with that name if there is one, and be done."""

    def play() -> None:
        while (request := read_request(stage)) is None:
            time.sleep(0.01)
        if name is not None:
            path = trace_path(stage, name)
            table_beside(path).write_text(f"{request.steps} step(s)\n")
            path.write_bytes(b"trace")
        remove_request(stage)

    thread = Thread(target=play, daemon=True)
    thread.start()
    return thread


def test_the_table_and_the_trace_are_named_also_if_an_older_trace_has_the_same_name(stage, capsys):
    with owner.training(stage):
        for steps in (3, 4):
            rank_0 = answer(stage, name="step_000000000016")
            assert main(["profile", "mine", "--steps", str(steps)]) == 0
            rank_0.join()
            shown = capsys.readouterr()
            assert "asked autoencode for" in shown.err
            assert shown.out.splitlines()[0] == f"{steps} step(s)"
            assert shown.out.rstrip().endswith("runs/mine/autoencode/profile/step_000000000016.trace.json.gz")


def test_without_a_training_the_way_for_a_new_run_is_named(stage, capsys):
    (stage / "status.json").write_text('{"state": "done", "samples": 96, "of": 96}')
    assert main(["profile", "mine", "--steps", "7"]) == 2
    error = capsys.readouterr().err
    assert "no stage of runs/mine trains now" in error
    assert "`spresso run RECIPE log.profile_steps=7` traces a new run" in error
    assert not trace_folder(stage).exists()


def test_a_second_request_is_refused_and_the_first_stays(stage, monkeypatch, capsys):
    write_request(stage, TraceRequest(steps=2, asked=7.0))
    monkeypatch.setattr(asking, "write_request", lambda *unused: pytest.fail("the first request is replaced"))
    with owner.training(stage):
        assert main(["profile", "mine"]) == 2
    assert "a trace of runs/mine/autoencode is asked for already, since 1970" in capsys.readouterr().err
    assert read_request(stage) == TraceRequest(steps=2, asked=7.0)


def test_a_trace_that_was_not_written_is_an_error(stage, capsys):
    with owner.training(stage):
        answer(stage, name=None)
        assert main(["profile", "mine"]) == 2
    assert "runs/mine/autoencode wrote no trace" in capsys.readouterr().err


def test_a_training_that_ends_first_leaves_no_request(stage, capsys):
    def end() -> None:
        while read_request(stage) is None:
            time.sleep(0.01)
        (stage / "status.json").write_text('{"state": "stopped", "samples": 8, "of": 96}')

    ending = Thread(target=end, daemon=True)
    ending.start()
    assert main(["profile", "mine"]) == 2
    assert "runs/mine/autoencode is stopped, and no trace was made" in capsys.readouterr().err
    assert read_request(stage) is None
