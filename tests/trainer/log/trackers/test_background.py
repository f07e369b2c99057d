"""Trackers beside training: those that raise, hang or fall behind hold nobody up, and the log says so once."""

from __future__ import annotations

import errno
import logging
import threading
import time

import numpy as np
import pytest

from trainer.log.trackers import background
from trainer.log.trackers.background import Background, any_abandoned
from trainer.log.trackers.events import HeardClip, Points, WentBack
from trainer.log.trackers.fan_out import Trackers


class Noted:
    """A tracker that keeps what it gets; `trouble` is called first in each method, with the method's name."""

    def __init__(self, trouble=lambda method: None) -> None:
        self.trouble, self.got = trouble, []

    def start(self) -> None:
        self.trouble("start")
        self.got.append("start")

    def points(self, event: Points) -> None:
        self.trouble("points")
        self.got.append(event.samples)

    def clip(self, event: HeardClip) -> None:
        self.trouble("clip")
        self.got.append(event.key)

    def go_back(self, samples: int) -> None:
        self.trouble("go_back")
        self.got.append(f"back to {samples}")

    def finish(self) -> None:
        self.trouble("finish")
        self.got.append("finish")


def line(samples: int) -> Points:
    return Points("train", samples, {"train/loss": 1.0})


def clip(mib: int) -> HeardClip:
    return HeardClip("clip", 0, np.zeros(mib << 18, np.float32), 48_000, np.zeros((1, 1, 3), np.uint8))


def ended(*sinks: Noted, seconds: float = 60.0) -> Trackers:
    trackers = Trackers(Background(f"of {number}", sink) for number, sink in enumerate(sinks))
    for event in (line(8), clip(0), WentBack(4), line(8)):
        trackers.put(event)
    trackers.close(seconds)
    return trackers


def warnings_of(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_tracker_gets_everything_in_order(caplog):
    sink = Noted()
    ended(sink)
    assert sink.got == ["start", 8, "clip", "back to 4", 8, "finish"]
    assert warnings_of(caplog) == []


def raising(*methods: str, error: BaseException | None = None, times: int = 10**9):
    left = [times]

    def trouble(method: str) -> None:
        if method in methods and left[0]:
            left[0] -= 1
            raise error or RuntimeError("no server at https://me:hunter2@host/path?key=hunter2\nsecond line")

    return trouble


@pytest.mark.parametrize(
    ("methods", "got", "lacks", "says"),
    [
        (("start",), [], 4, "does not start: RuntimeError"),
        (("points",), ["start", "clip", "back to 4", "finish"], 2, "fails: RuntimeError"),
        (("clip",), ["start", 8, "back to 4", 8, "finish"], 1, "fails: RuntimeError"),
        (("points", "clip", "go_back"), ["start", "finish"], 4, "fails: RuntimeError"),
        (("finish",), ["start", 8, "clip", "back to 4", 8], 0, "does not end well: RuntimeError"),
    ],
)
def test_a_tracker_that_raises_is_named_once_and_harms_no_other(methods, got, lacks, says, caplog):
    bad, good = Noted(raising(*methods)), Noted()
    trackers = ended(bad, good)
    assert bad.got == got
    assert good.got == ["start", 8, "clip", "back to 4", 8, "finish"]
    assert [background.left_out for background in trackers.backgrounds] == [lacks, 0]
    first, *others = warnings_of(caplog)
    assert first == f"the tracker of 0 {says}: no server at https://…host/path?…; training goes on without it"
    assert others == ([f"the tracker of 0 lacks {lacks} event(s); metrics.jsonl has them"] if lacks else [])


def test_a_full_disk_and_an_exit_are_no_end(caplog):
    full = Noted(raising("points", error=OSError(errno.ENOSPC, "No space left on device")))
    leaving = Noted(raising("start", error=SystemExit(1)))
    ended(full, leaving)
    assert full.got[-1] == "finish"
    said = warnings_of(caplog)
    assert any("of 0 fails: OSError: [Errno 28] No space left on device" in text for text in said)
    assert any("of 1 does not start: SystemExit" in text for text in said)


def test_a_tracker_that_starts_late_gets_what_waited(monkeypatch):
    monkeypatch.setattr(background, "_RETRY", 0.0)
    fails, arrived = raising("start", times=3), threading.Event()
    sink = Noted(lambda method: arrived.set() if method == "points" else fails(method))
    trackers = Trackers([Background("late", sink)])
    trackers.put(line(8))
    assert arrived.wait(30)
    trackers.close()
    assert sink.got == ["start", 8, "finish"]
    assert trackers.backgrounds[0].left_out == 0


@pytest.fixture
def stuck(monkeypatch):
    """A tracker that hangs in its first event until the test ends."""
    monkeypatch.setattr(background, "_abandoned", [])
    reached, release = threading.Event(), threading.Event()

    def trouble(method: str) -> None:
        if method == "points":
            reached.set()
            release.wait()

    sink = Noted(trouble)
    tracker = Background("stuck", sink)
    tracker.put(line(0))
    assert reached.wait(30)
    yield tracker, sink, release
    release.set()
    tracker.close()
    tracker._thread.join(30)
    assert not tracker._thread.is_alive()


def test_a_tracker_that_hangs_is_left_behind(stuck, caplog):
    tracker, sink, _ = stuck
    assert not any_abandoned()
    for samples in range(1, background.MOST_EVENTS + 11):
        tracker.put(line(samples))
    assert tracker.left_out == 10
    tracker.put(WentBack(0))  # later points would stand beside the wrong ones without it
    assert tracker.left_out == 10
    tracker.close()
    tracker.join(time.monotonic())
    assert any_abandoned()
    assert tracker.left_out == background.MOST_EVENTS + 11
    assert warnings_of(caplog) == [
        "the tracker stuck is too far behind; training goes on without it",
        "the tracker stuck does not end, and is left behind",
        f"the tracker stuck lacks {background.MOST_EVENTS + 11} event(s); metrics.jsonl has them",
    ]
    assert sink.got == ["start"]


def test_what_was_left_behind_writes_nothing_more_when_it_wakes(stuck):
    tracker, sink, release = stuck
    tracker.put(line(8))
    tracker.close()
    tracker.join(time.monotonic())
    release.set()
    tracker._thread.join(30)
    assert sink.got[:2] == ["start", 0]
    assert 8 not in sink.got


def test_what_waits_is_bounded_in_bytes(stuck):
    tracker, _, _ = stuck
    part = background.MOST_BYTES >> 21  # MiB: half of it
    tracker.put(clip(part))
    tracker.put(clip(part))
    assert tracker.left_out == 1
    tracker.put(line(8))
    assert tracker.left_out == 1


def test_a_clip_larger_than_the_bound_passes_alone():
    sink = Noted()
    trackers = Trackers([Background("large", sink)])
    trackers.put(clip((background.MOST_BYTES >> 20) + 1))
    trackers.close()
    assert sink.got == ["start", "clip", "finish"]
