"""Asked to leave at a bad moment: in an evaluation, while data does not come, without time, after being replaced."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from trainer.checkpoints import checkpoint
from trainer.data.stream import LatentStream
from trainer.log.held_out import HeldOutLoss, ListeningClips
from trainer.log.metrics import read_metrics
from trainer.loop import train
from trainer.ranks.flat_ranges import whole_ranges
from trainer.stop import Stop

PRETRAIN = ("pretrain.samples=96", "log.every=8", "checkpoint.every=32")


class Asked(Stop):
    """A stop that something else sets."""

    now = False
    in_a_hurry = False

    def __call__(self) -> bool:
        return self.now

    def has_less_than(self, seconds: float) -> bool:
        return self.in_a_hurry


@pytest.fixture
def stop() -> Asked:
    return Asked()


@pytest.fixture
def whole(tiny, tmp_path) -> dict[int, float]:
    """The losses of a run that nobody asked to leave."""
    assert train(tiny(*PRETRAIN, run_dir=tmp_path / "whole"), "pretrain") == "done"
    return losses(tmp_path / "whole")


def losses(run_dir: Path) -> dict[int, float]:
    lines = read_metrics(run_dir / "pretrain" / "metrics.jsonl")
    return {line["samples"]: line["loss"] for line in lines if line["kind"] == "train"}


def saved(run_dir: Path) -> list[int]:
    return [checkpoint.samples_of(path) for path in checkpoint.checkpoints(run_dir / "pretrain" / "checkpoints")]


def test_an_evaluation_is_given_up_and_the_step_before_it_saved(tiny, tmp_path, stop, whole, monkeypatch):
    batches = []
    of = HeldOutLoss._batches

    def counted(loss, device):
        for batch in of(loss, device):
            batches.append(batch)
            stop.now = len(batches) == 2
            yield batch

    monkeypatch.setattr(HeldOutLoss, "_batches", counted)
    config = tiny(*PRETRAIN, "parallel.micro_batch=4", "log.held_out=32")
    assert train(config, "pretrain", stop=stop) == "stopped"
    assert len(batches) == 2
    assert saved(tmp_path / "run") == [32]
    stop.now = False
    assert train(config, "pretrain", stop=stop) == "done"
    assert losses(tmp_path / "run") == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("samples_every", [32, 0], ids=["in the middle", "at the end"])
def test_listening_is_given_up(tiny, tmp_path, stop, whole, monkeypatch, samples_every):
    decoded = ListeningClips.decoded

    def asked_meanwhile(clips, task, strategy, between):
        stop.now = True
        return decoded(clips, task, strategy, between)

    monkeypatch.setattr(ListeningClips, "decoded", asked_meanwhile)
    config = tiny(*PRETRAIN, f"log.samples_every={samples_every}")
    assert train(config, "pretrain", stop=stop) == "stopped"
    assert saved(tmp_path / "run")[-1] == (samples_every or 96)
    monkeypatch.undo()
    assert train(config, "pretrain") == "done"
    assert losses(tmp_path / "run") == pytest.approx(whole, rel=1e-6)


def test_a_batch_that_does_not_come_makes_the_step_void(tiny, tmp_path, stop, whole, monkeypatch):
    go_on, read = threading.Event(), LatentStream._read

    def stalled(stream, deal, out):
        if min(deal.positions) >= 40 and not go_on.is_set():
            go_on.wait(1)  # until the loop is there, too: it is read ahead
            stop.now = True
            go_on.wait(60)
        return read(stream, deal, out)

    monkeypatch.setattr(LatentStream, "_read", stalled)
    config = tiny(*PRETRAIN, "parallel.micro_batch=4")
    assert train(config, "pretrain", stop=stop) == "stopped"
    assert not go_on.is_set()  # nobody waited for the reader
    go_on.set()
    assert saved(tmp_path / "run")[-1] == 40
    stop.now = False
    assert train(config, "pretrain", stop=stop) == "done"
    assert losses(tmp_path / "run") == pytest.approx(whole, rel=1e-6)


def test_without_time_the_last_checkpoint_counts_and_the_log_says_so(tiny, tmp_path, stop, whole):
    class AtStep(Asked):
        left = 7
        in_a_hurry = True

        def before_step(self, samples: int) -> None:
            self.left -= 1

        def __call__(self) -> bool:
            return self.left <= 0

    config = tiny(*PRETRAIN)
    assert train(config, "pretrain", stop=AtStep()) == "stopped"
    assert saved(tmp_path / "run") == [32]
    assert "stopped at 56 samples, not saved" in (tmp_path / "run/pretrain/logs/rank_0.log").read_text()
    assert train(config, "pretrain") == "done"
    assert losses(tmp_path / "run") == pytest.approx(whole, rel=1e-6)


def test_how_long_a_save_takes_is_known_after_a_restart(tiny):
    class Told(Asked):
        def has_less_than(self, seconds: float) -> bool:
            self.seconds = seconds
            return False

    first, second = Told(), Told()
    first.now = second.now = True
    config = tiny(*PRETRAIN)
    for stop in (first, second):
        assert train(config, "pretrain", stop=stop) == "stopped"
    assert first.seconds == 0 < second.seconds


def test_who_was_replaced_writes_nothing_more(tiny, tmp_path, whole):
    class Replaced(RuntimeError):
        pass

    def written() -> dict[Path, int]:
        paths = [*(tmp_path / "run/pretrain").glob("*.json*"), *(tmp_path / "run/pretrain/checkpoints").glob("step_*")]
        return {path: path.stat().st_mtime_ns for path in paths}

    calls, then = [], {}

    def require_ownership() -> None:
        calls.append(1)
        if len(calls) > 8:
            then.setdefault("written", written())
            raise Replaced("another start has taken over")

    config = tiny(*PRETRAIN[:2], "checkpoint.every=1000")  # a save checks in a thread of its own
    with pytest.raises(Replaced):
        train(config, "pretrain", require_ownership=require_ownership)
    assert then["written"] == written()
    assert train(config, "pretrain") == "done"
    assert losses(tmp_path / "run") == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("checks", [0, 1], ids=["before it begins", "while it is written"])
def test_a_save_of_who_was_replaced_does_not_appear(tmp_path, checks):
    left = iter(range(checks))

    def require_ownership() -> None:
        if next(left, None) is None:
            raise RuntimeError("another start has taken over")

    tensors = whole_ranges({"weight": torch.ones(3)})
    with pytest.raises(OSError, match="taken over"):
        checkpoint.save(tmp_path, 8, tensors, {}, require_ownership=require_ownership)
    assert checkpoint.checkpoints(tmp_path) == []


class AskedAt(Stop):
    """A stop from the step on that begins at these samples."""

    def __init__(self, samples: int) -> None:
        self.at, self.reached = samples, samples <= 0

    def before_step(self, samples: int) -> None:
        self.reached = samples >= self.at

    def __call__(self) -> bool:
        return self.reached


def held_out_lines(run_dir: Path) -> list[tuple[int, float]]:
    lines = read_metrics(run_dir / "pretrain" / "metrics.jsonl")
    return [(line["samples"], line["loss"]) for line in lines if line["kind"] == "held_out"]


def listened(run_dir: Path) -> dict[str, bytes]:
    folder = run_dir / "pretrain" / "samples"
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.flac")}


@pytest.mark.parametrize("samples", [24, 88])
def test_what_was_due_at_the_last_step_is_made_up_for(tiny, tmp_path, samples):
    settings = (*PRETRAIN, "log.samples_every=32")
    assert train(tiny(*settings, run_dir=tmp_path / "other"), "pretrain") == "done"
    assert train(tiny(*settings), "pretrain", stop=AskedAt(samples)) == "stopped"
    assert train(tiny(*settings), "pretrain", stop=AskedAt(0)) == "stopped"
    assert train(tiny(*settings), "pretrain") == "done"
    assert held_out_lines(tmp_path / "run") == held_out_lines(tmp_path / "other")
    assert listened(tmp_path / "run") == listened(tmp_path / "other")
