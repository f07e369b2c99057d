"""`spresso logs`: what a rank writes, as it is written, and what its job says beside it.

A stage's `logs/` has `rank_K.log` of each rank, `job_J.out` of the job's script and `job_J_K.out` of what each of its
tasks prints; of an array, `job_J_PART.out` and `job_J_PART_K.out`. One script for all stages writes to the `logs/` of
the run instead.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from trainer.stages import STAGES

_LINES = 60  # shown of what was written before
_LINES_BESIDE = 10  # of the job's own output
_END = 65_536  # bytes that such lines are looked for in
_PAUSE = 0.5  # seconds between two looks


def logs(run: Path, *, stage: str | None, rank: int | None, follow: bool) -> None:
    """Print the log of a rank of the stage that runs or ran last; with `follow` until Ctrl-C, into the next stages too.

    Raises:
        ValueError: there is no such stage or rank; names those there are.
    """
    shown = newest(run, stage, rank)
    if not shown and not follow:
        raise ValueError(f"{run} has no logs{f' of {stage}' if stage else ''} yet; -f waits for them")
    files = {path: _File(path, at_end=path not in shown) for path in _all(run, stage, rank)}
    for path, lines in zip(shown, (_LINES, _LINES_BESIDE), strict=False):
        files.setdefault(path, _File(path))
        _show(f"== {path}", *files[path].last(lines, torn=not follow))
    if not follow:
        return
    if not shown:
        _show("== nothing is written yet")
    try:
        for line in follow_lines(run, stage, rank, files, shown[-1] if shown else None):
            _show(line)
    except KeyboardInterrupt:
        return


def newest(run: Path, stage: str | None, rank: int | None) -> list[Path]:
    """The log to show: a rank's own, or what its task printed where it has none; and the job's output if it is newer.

    Raises:
        ValueError: there is no such stage or rank; names those there are.
    """
    begun = [run / name / "logs" for name in STAGES if any((run / name / "logs").glob("*.*"))]
    folders = [folder for folder in begun if stage in (None, folder.parent.name)]
    told = ", ".join(folder.parent.name for folder in begun) or "none yet"
    if stage is not None and not folders and (begun or stage not in STAGES):
        raise ValueError(f"{run} has no logs of {stage}; there are those of: {told}")
    folder = max(folders, key=_last_written, default=run / "logs")
    ranks = {number for path in folder.glob("*.*") if (number := _rank(path)) is not None}
    if ranks and rank is not None and rank not in ranks:
        there = f"{min(ranks)} to {max(ranks)}" if len(ranks) > 1 else f"{min(ranks)}"
        raise ValueError(f"{folder.parent.name} has no log of rank {rank}; there are: {there}")
    own = _latest([path for path in [*folder.glob("job_*.out"), *run.glob("logs/job_*.out")] if _rank(path) is None])
    main = _latest(_of_rank(folder, rank or 0)) or own
    beside = own is not None and main is not None and own != main and own.stat().st_mtime >= main.stat().st_mtime
    return [path for path in (main, own if beside else None) if path is not None]


def follow_lines(
    run: Path, stage: str | None, rank: int | None, files: dict[Path, _File], told: Path | None = None
) -> Iterator[str]:
    """Lines as they are written, with a head where they are another file's than those before; no end.

    Args:
        run: its directory.
        stage: only this one's.
        rank: of its ranks.
        files: what was read before; new ones are read from their beginning.
        told: the file whose lines were shown last.
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
    """A log, read on from where it was read to."""

    def __init__(self, path: Path, *, at_end: bool = False) -> None:
        self.path, self.rest = path, b""
        self.inode = self.at = 0
        if at_end:
            self.last(0)

    def last(self, lines: int, *, torn: bool = False) -> list[str]:
        """The last whole lines so far, without reading a long file; with `torn` what has no end yet as well."""
        try:
            with self.path.open("rb") as file:
                self.inode, size = _identity(file)
                start = max(0, size - _END)
                file.seek(start)
                content = file.read()
        except OSError:
            return []
        self.at = start + len(content)
        *found, self.rest = content.split(b"\n")
        found = [*(found[1:] if start else found), *([self.rest] if torn and self.rest else [])]
        return [_text(line) for line in found[-lines:]] if lines else []

    def new(self) -> list[str]:
        """Whole lines since the last time; of a file that was begun anew or put in place of this one, all."""
        try:
            with self.path.open("rb") as file:  # opened anew each time, or a network's file system tells old news
                inode, size = _identity(file)
                if inode != self.inode or size < self.at:
                    self.inode, self.at, self.rest = inode, 0, b""
                file.seek(self.at)
                content = file.read()
        except OSError:  # gone for a moment, as when it is rotated
            return []
        self.at += len(content)
        *found, self.rest = (self.rest + content).split(b"\n")
        return [_text(line) for line in found]


def _all(run: Path, stage: str | None, rank: int | None) -> list[Path]:
    """All that a follower looks at: of each stage one rank's logs, and what the jobs themselves say."""
    found = []
    for folder in _folders(run):
        if stage is None or folder.parent.name == stage or folder.parent == run:
            found += _of_rank(folder, rank or 0)
            found += [path for path in sorted(folder.glob("job_*.out")) if _rank(path) is None]
    return found


def _folders(run: Path) -> list[Path]:
    return [run / "logs", *(run / name / "logs" for name in STAGES)]


def _of_rank(folder: Path, rank: int) -> list[Path]:
    """Its log, which has what its tasks print; or their outputs where it has none."""
    log = folder / f"rank_{rank}.log"
    return [log] if log.exists() else [path for path in sorted(folder.glob("job_*.out")) if _rank(path) == rank]


def _rank(path: Path) -> int | None:
    """Whose log it is by its name; None for a job's own."""
    if match := re.fullmatch(r"rank_(\d+)\.log", path.name):
        return int(match[1])
    match = re.fullmatch(r"job_(\d+)(?:_(\d+))?(?:_(\d+))?\.out", path.name)
    if match is None or match[2] is None:
        return None
    if match[3] is not None:
        return int(match[3])
    # job_12_3: of task 3 if there is a script 12 that has started it, otherwise of the script of part 3
    script = f"job_{match[1]}.out"
    whole = (path.parent / script).exists() or (path.parents[2] / "logs" / script).exists()
    return int(match[2]) if whole else None


def _latest(paths: list[Path]) -> Path | None:
    """The one that was written to last, of those with anything in them."""
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
        print(line)
    sys.stdout.flush()
