"""What becomes of a job whose ranks have ended: it is over, or it comes back because its failure may pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

DONE, REQUEUE, OVER = "done", "requeued", "over"
_LOST_TIMES = 3  # in a row at one place: a rank that is killed there each time is no accident
_STANDSTILL = 5  # starts in a row that got no further
_PEERS = ("DistBackendError", "DistNetworkError", "ConnectionError", "ConnectionResetError", "BrokenPipeError")
_PEER_WORDS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo", "NCCL", "Socket")


@dataclass(frozen=True)
class Verdict:
    """What is to be done, and why."""

    then: str
    """DONE, REQUEUE or OVER."""
    why: str
    failure: str = ""
    """What failed, the same words for the same failure; empty where nothing did."""


def judge(
    status: int,
    notes: Mapping[int, Mapping[str, Any]],
    past: Sequence[Mapping[str, Any]],
    place: int | None,
    *,
    tasks: int = 0,
) -> Verdict:
    """Judge a start by what its ranks left behind.

    Args:
        status: srun's exit status.
        notes: of the ranks that left one.
        past: the starts before, oldest first, as `history` has them.
        place: samples of the newest checkpoint, where the next start goes on; None where it can't be told.
        tasks: how many ranks there were; 0: not known.
    """
    by_outcome: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
    for rank, note in notes.items():
        by_outcome.setdefault(note["outcome"], []).append((rank, note))

    if mistakes := by_outcome.get("mistake"):
        return Verdict(OVER, _first(mistakes)["message"], failure="mistake")
    failed = by_outcome.get("failed", [])
    if own := [item for item in failed if not _echo(item[1])]:
        rank, note = min(own, key=lambda item: item[1]["time"])
        failure = f"{note['type']}: {note['message'].splitlines()[0] if note['message'] else ''}"
        told = f"rank {rank} on {note['host']}: {failure}"
        if _same_before(past, failure, place, times=1):
            return Verdict(OVER, f"{told}; the same at the same place as before, so it would come again", failure)
        return _go_on(past, place, told, failure)
    if "superseded" in by_outcome:
        return Verdict(OVER, "another start of this run has taken over", failure="superseded")
    if status == 0 and notes.get(0, {}).get("outcome") == "done":
        return Verdict(DONE, "")
    leaving = [*by_outcome.get("stopped", ()), *by_outcome.get("left", ())]
    if status == 0 and leaving:
        return _go_on(past, place, _first(leaving).get("why", "was asked to leave"), "")
    lost = f"{_missing(notes, tasks)} ended without a word (srun's status {status}{_signal(status)})"
    if _same_before(past, lost, place, times=_LOST_TIMES - 1):
        return Verdict(OVER, f"{lost}, {_LOST_TIMES} times in a row at the same place", lost)
    return _go_on(past, place, lost, lost)


def _go_on(past: Sequence[Mapping[str, Any]], place: int | None, why: str, failure: str) -> Verdict:
    """Requeue, unless the run has stood still for too long."""
    standing = [entry for entry in past[-_STANDSTILL + 1 :] if entry.get("then") == REQUEUE and entry["place"] == place]
    if place is not None and len(standing) == _STANDSTILL - 1:
        return Verdict(
            OVER,
            f"{why}; {_STANDSTILL} starts in a row got no further{f' than {place}' if place else ''}: give "
            f"jobs more time (cluster.time), or save more often (checkpoint.every)",
            failure or "standstill",
        )
    return Verdict(REQUEUE, why, failure)


def _same_before(past: Sequence[Mapping[str, Any]], failure: str, place: int | None, *, times: int) -> bool:
    """Whether the last starts all failed like this, and here."""
    recent = [entry for entry in past[-times:] if entry.get("failure") == failure and entry.get("place") == place]
    return len(recent) == times


def _echo(note: Mapping[str, Any]) -> bool:
    """Whether it is only what another rank's end looks like."""
    return note["type"] in _PEERS or any(word in note["message"] for word in _PEER_WORDS)


def _first(notes: list[tuple[int, Mapping[str, Any]]]) -> Mapping[str, Any]:
    return min(notes, key=lambda item: item[1]["time"])[1]


def _missing(notes: Mapping[int, Any], tasks: int) -> str:
    ranks = [str(rank) for rank in range(tasks) if rank not in notes]
    return f"rank {', '.join(ranks)}" if 0 < len(ranks) < 9 else "a rank"


def _signal(status: int) -> str:
    return f": signal {status - 128}" if 128 < status < 193 else ""
