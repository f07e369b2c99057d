"""Decides what becomes of a job whose ranks have ended: it is done, it is requeued, or it is over.

A job is over if a person must act, or if the same failure recurs without progress.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

DONE, REQUEUE, RESTART, OVER = "done", "requeued", "restarted", "over"
_LOST_TIMES = 3  # consecutive kills of a rank at the same sample, after which the job is over
_STANDSTILL = 5  # consecutive starts without progress, after which the job is over
_PEERS = ("DistBackendError", "DistNetworkError", "ConnectionError", "ConnectionResetError", "BrokenPipeError")
_PEER_WORDS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo", "NCCL", "Socket")


@dataclass(frozen=True)
class Verdict:
    """What becomes of a job, and why."""

    then: str
    """DONE, REQUEUE or OVER. The supervisors of a job's ranks make RESTART of REQUEUE if they can."""
    why: str
    """Reason, for people."""
    failure: str = ""
    """What failed, with the same text for the same failure; empty if nothing failed."""


def judge(
    status: int,
    notes: Mapping[int, Mapping[str, Any]],
    past: Sequence[Mapping[str, Any]],
    place: int | None,
    *,
    tasks: int = 0,
) -> Verdict:
    """Judge a start of a job by the notes of its ranks.

    Args:
        status: exit status of srun.
        notes: the notes that ranks left, by rank.
        past: history of the earlier starts, oldest first.
        place: samples of the newest checkpoint, from which the next start resumes; None if unknown.
        tasks: number of ranks; 0 if unknown.
    """
    by_outcome: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
    for rank, note in notes.items():
        by_outcome.setdefault(note["outcome"], []).append((rank, note))

    if mistakes := by_outcome.get("mistake"):
        return Verdict(OVER, _first(mistakes).get("message", ""), failure="mistake")
    failed = by_outcome.get("failed", [])
    if own := [item for item in failed if not _echo(item[1])]:
        rank, note = min(own, key=lambda item: item[1]["time"])
        failure = f"{note.get('type', 'an error')}: {next(iter(note.get('message', '').splitlines()), '')}"
        message = f"rank {rank} on {note['host']}: {failure}"
        if _same_before(past, failure, place, times=1):
            return Verdict(OVER, f"{message}; it failed like this at the same place before, so it would again", failure)
        return _requeue_unless_stuck(past, place, message, failure)
    if "superseded" in by_outcome:
        return Verdict(OVER, "another start of this run has taken over", failure="superseded")
    if status == 0 and notes.get(0, {}).get("outcome") == "done":
        return Verdict(DONE, "")
    leaving = [*by_outcome.get("stopped", ()), *by_outcome.get("left", ())]
    if status == 0 and leaving:
        return _requeue_unless_stuck(past, place, _first(leaving).get("why", "was asked to leave"), "")
    if killed := by_outcome.get("killed"):
        rank, note = min(killed, key=lambda item: item[1]["time"])
        lost = f"rank {rank} {note.get('why', 'was killed')}"
    else:
        lost = f"{_name_missing(notes, tasks)} ended without a note (status {status} of srun{_signal(status)})"
    if _same_before(past, lost, place, times=_LOST_TIMES - 1):
        return Verdict(OVER, f"{lost}, {_LOST_TIMES} consecutive times at the same place", lost)
    return _requeue_unless_stuck(past, place, lost, lost)


def _requeue_unless_stuck(past: Sequence[Mapping[str, Any]], place: int | None, why: str, failure: str) -> Verdict:
    """Requeue the job, unless too many consecutive starts made no progress."""
    stuck = [
        entry
        for entry in past[-_STANDSTILL + 1 :]
        if entry.get("then") in (REQUEUE, RESTART) and entry.get("place") == place
    ]
    if place is not None and len(stuck) == _STANDSTILL - 1:
        return Verdict(
            OVER,
            f"{why}; {_STANDSTILL} consecutive starts made no progress{f' beyond {place}' if place else ''}: give "
            f"jobs more time (cluster.time), or save more often (checkpoint.every)",
            failure or "standstill",
        )
    return Verdict(REQUEUE, why, failure)


def _same_before(past: Sequence[Mapping[str, Any]], failure: str, place: int | None, *, times: int) -> bool:
    """Whether each of the last `times` starts had the same failure at the same place."""
    recent = [entry for entry in past[-times:] if entry.get("failure") == failure and entry.get("place") == place]
    return len(recent) == times


def _echo(note: Mapping[str, Any]) -> bool:
    """Whether a failure is only the consequence of another rank's end."""
    return note.get("type") in _PEERS or any(word in note.get("message", "") for word in _PEER_WORDS)


def _first(notes: list[tuple[int, Mapping[str, Any]]]) -> Mapping[str, Any]:
    return min(notes, key=lambda item: item[1]["time"])[1]


def _name_missing(notes: Mapping[int, Any], tasks: int) -> str:
    ranks = [str(rank) for rank in range(tasks) if rank not in notes]
    return f"rank {', '.join(ranks)}" if 0 < len(ranks) < 9 else "a rank"


def _signal(status: int) -> str:
    return f": signal {status - 128}" if 128 < status < 193 else ""
