"""Stages of runs that are looked at again and again: only what has changed is read again."""

from __future__ import annotations

from pathlib import Path

from launch.slurm.submitted_jobs import Submitted, submitted
from launch.status.stage_status import StageStatus
from trainer.run_documents import UPLOAD
from trainer.stages import STAGES

_FILES = ("status.json", "owner.json", "metrics.jsonl", "attempts/history.jsonl", "export", UPLOAD, "incident.json")
_OF_THE_MOMENT = ("state", "parts", "_alive_by_hand")  # what follows from the clock, a process or the queue

Signature = tuple[tuple[int, int, int] | None, ...]


class KeptStages:
    """Returns the stages of runs as `table.stages_of` does, with what was read of them before and has not changed."""

    def __init__(self) -> None:
        self._kept: dict[Path, tuple[Signature, StageStatus]] = {}
        self._jobs: dict[Path, tuple[Signature, dict[str, Submitted]]] = {}

    def stages_of(self, run: Path) -> list[StageStatus]:
        """Return the stages that have begun or were submitted. Raises ValueError if jobs.jsonl is damaged."""
        jobs = self._submitted(run)
        found = [self._stage(run / name, jobs.get(name)) for name in STAGES]
        return [stage for stage in found if stage is not None]

    def _submitted(self, run: Path) -> dict[str, Submitted]:
        signature = (_signature(run / "jobs.jsonl"),)
        known = self._jobs.get(run)
        if known is None or known[0] != signature:
            self._jobs[run] = known = (signature, submitted(run))
        return known[1]

    def _stage(self, folder: Path, job: Submitted | None) -> StageStatus | None:
        """Return the stage, read anew if one of its files has changed; None if it has neither begun nor a job."""
        if job is None and not folder.is_dir():
            return None
        signature = tuple(_signature(folder / name) for name in _FILES)
        known = self._kept.get(folder)
        if known is not None and known[0] == signature and known[1].job == job and not _is_in_doubt(known[1]):
            for name in _OF_THE_MOMENT:
                vars(known[1]).pop(name, None)
            known[1].elements = []
            return known[1]
        stage = StageStatus(folder, job)
        if job is None and not stage.begun:
            return None
        self._kept[folder] = (signature, stage)
        return stage


def _is_in_doubt(stage: StageStatus) -> bool:
    """Whether something could not be read, which a disk that was away for a moment explains."""
    return bool(stage.damaged) or not stage.line


def _signature(path: Path) -> tuple[int, int, int] | None:
    """Return what changes with a file or folder; None if there is none."""
    try:
        status = path.stat()
    except OSError:  # a disk that is away says so when the file is read
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns
