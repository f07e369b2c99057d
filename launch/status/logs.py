"""`spresso logs`: prints and follows the log of a rank, together with the output of its job.

A stage's `logs/` has a `rank_K.log` for each rank, a `job_J.out` for the batch script, and a `job_J_K.out` for the
output of each task; for an array, `job_J_PART.out` and `job_J_PART_K.out`. A single script for all stages writes to the
`logs/` of the run instead.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from models.documents import opened
from trainer.file_names import printable_lines
from trainer.stages import STAGES

_LINES = 60  # lines of a rank's log to show
_JOB_LINES = 10  # lines of the job's output to show
_END = 65_536  # bytes at the end of a file in which these lines are searched
_PAUSE = 0.5  # seconds between two polls


def logs(run: Path, *, stage: str | None, rank: int | None, follow: bool) -> None:
    """Print the end of the log of one rank.

    Args:
        run: directory of the run.
        stage: stage whose log to print; None: the stage that runs or ran last.
        rank: rank whose log to print; None: rank 0.
        follow: keep printing new lines until Ctrl-C, also those of later stages.

    Raises:
        ValueError: there is no such stage or rank; the message names those that exist.
    """
    shown = newest(run, stage, rank)
    if not shown and not follow:
        raise ValueError(f"{run} has no logs{f' of {stage}' if stage else ''} yet; -f waits for them")
    files = {path: _File(path, at_end=path not in shown) for path in _all(run, stage, rank)}
    for path, lines in zip(shown, (_LINES, _JOB_LINES), strict=False):
        files.setdefault(path, _File(path))
        _show(f"== {path}", *files[path].last(lines, torn=not follow))
    if not follow:
        return
    if not shown:
        _show("== no log has been written yet")
    try:
        for line in follow_lines(run, stage, rank, files, shown[-1] if shown else None):
            _show(line)
    except KeyboardInterrupt:
        return


def newest(run: Path, stage: str | None, rank: int | None) -> list[Path]:
    """Return the files to show: the rank's log, or else its task's output; then the job's output if that is newer.

    Raises:
        ValueError: there is no such stage or rank; the message names those that exist.
    """
    begun = [run / name / "logs" for name in STAGES if any((run / name / "logs").glob("*.*"))]
    folders = [folder for folder in begun if stage in (None, folder.parent.name)]
    known = ", ".join(folder.parent.name for folder in begun) or "none yet"
    if stage is not None and not folders and (begun or stage not in STAGES):
        raise ValueError(f"{run} has no logs of {stage}; it has those of: {known}")
    folder = max(folders, key=_last_written, default=run / "logs")
    ranks = {number for path in folder.glob("*.*") if (number := _rank(path)) is not None}
    if ranks and rank is not None and rank not in ranks:
        there = f"{min(ranks)} to {max(ranks)}" if len(ranks) > 1 else f"{min(ranks)}"
        raise ValueError(f"{folder.parent.name} has no log of rank {rank}; it has those of: {there}")
    own = _latest([path for path in [*folder.glob("job_*.out"), *run.glob("logs/job_*.out")] if _rank(path) is None])
    main = _latest(_of_rank(folder, rank or 0)) or own
    beside = own is not None and main is not None and own != main and own.stat().st_mtime >= main.stat().st_mtime
    return [path for path in (main, own if beside else None) if path is not None]


def follow_lines(
    run: Path, stage: str | None, rank: int | None, files: dict[Path, _File], told: Path | None = None
) -> Iterator[str]:
    """Yield new lines forever, with a heading whenever the file changes.

    Args:
        run: directory of the run.
        stage: stage to follow; None: all stages.
        rank: rank to follow; None: rank 0.
        files: files that were read before; other files are read from their beginning.
        told: file whose lines were shown last.
    """
    while True:
        paths = _all(run, stage, rank)
        for path in paths:
            lines = files.setdefault(path, _File(path)).new()
            if lines and path != told:
                yield f"== {path}"
                told = path
            yield from lines
        time.sleep(_PAUSE)


class _File:
    """A log file that remembers how far it was read."""

    def __init__(self, path: Path, *, at_end: bool = False) -> None:
        self.path, self.rest = path, b""
        self.inode = self.at = 0
        if at_end:
            self.last(0)

    def last(self, lines: int, *, torn: bool = False) -> list[str]:
        """Return the last complete lines, reading only the end of the file; `torn`: also an incomplete last line."""
        try:
            with opened(self.path) as file:
                self.inode, size = _identity(file)
                start = max(0, size - _END)
                file.seek(start)
                content = file.read()
        except (OSError, ValueError):  # also what is no file, such as a pipe
            return []
        self.at = start + len(content)
        *found, self.rest = content.split(b"\n")
        found = [*(found[1:] if start else found), *([self.rest] if torn and self.rest else [])]
        return [_text(line) for line in found[-lines:]] if lines else []

    def new(self) -> list[str]:
        """Return the complete lines since the last call; all lines if the file was replaced or truncated."""
        try:
            # opened each time, because a network file system may serve an open file from its cache
            with opened(self.path) as file:
                inode, size = _identity(file)
                if inode != self.inode or size < self.at:
                    self.inode, self.at, self.rest = inode, 0, b""
                file.seek(self.at)
                content = file.read()
        except (OSError, ValueError):  # gone for a moment, for example while it is rotated
            return []
        self.at += len(content)
        *found, self.rest = (self.rest + content).split(b"\n")
        return [_text(line) for line in found]


def _all(run: Path, stage: str | None, rank: int | None) -> list[Path]:
    """Return the files to follow: the logs of one rank in each stage, and the outputs of the jobs."""
    found = []
    for folder in _folders(run):
        if stage is None or folder.parent.name == stage or folder.parent == run:
            found += _of_rank(folder, rank or 0)
            found += [path for path in sorted(folder.glob("job_*.out")) if _rank(path) is None]
    return found


def _folders(run: Path) -> list[Path]:
    return [run / "logs", *(run / name / "logs" for name in STAGES)]


def _of_rank(folder: Path, rank: int) -> list[Path]:
    """Return the log of a rank, or else the outputs of its tasks."""
    log = folder / f"rank_{rank}.log"
    return [log] if log.exists() else [path for path in sorted(folder.glob("job_*.out")) if _rank(path) == rank]


def _rank(path: Path) -> int | None:
    """Return the rank whose log a file is, from its name; None for the output of a job."""
    if match := re.fullmatch(r"rank_(\d+)\.log", path.name):
        return int(match[1])
    match = re.fullmatch(r"job_(\d+)(?:_(\d+))?(?:_(\d+))?\.out", path.name)
    if match is None or match[2] is None:
        return None
    if match[3] is not None:
        return int(match[3])
    # job_12_3 is the output of task 3 if script 12 has an output too; otherwise it is that of the script of part 3
    script = f"job_{match[1]}.out"
    whole = (path.parent / script).exists() or (path.parents[2] / "logs" / script).exists()
    return int(match[2]) if whole else None


def _latest(paths: list[Path]) -> Path | None:
    """Return the file that was written last, without empty files; None if there is none."""
    return max((path for path in paths if path.stat().st_size), key=lambda path: path.stat().st_mtime, default=None)


def _last_written(folder: Path) -> float:
    return max((path.stat().st_mtime for path in folder.iterdir()), default=0.0)


def _identity(file: BinaryIO) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_ino, status.st_size


def _text(line: bytes) -> str:
    return line.decode("utf-8", "replace")


def _show(*lines: str) -> None:
    for line in lines:
        print(printable_lines(line))
    sys.stdout.flush()
