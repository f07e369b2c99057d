"""`spresso logs`: what a rank writes, as it is written."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

from launch.status import stages_of

_LINES = 60  # shown of what was written before
_PAUSE = 0.5  # seconds between two looks


def logs(run: Path, *, stage: str | None, rank: int | None, follow: bool) -> None:
    """Print the log of a rank of the stage that runs or ran last; with `follow` until Ctrl-C.

    Raises:
        ValueError: there is no such stage or rank; names those there are.
    """
    path = log_of(run, stage, rank)
    _show(f"== {path}")
    content = path.read_bytes()
    _show(*content.decode("utf-8", "replace").splitlines()[-_LINES:])
    if not follow:
        return
    try:
        for line in followed(run, stage, rank, path, len(content)):
            _show(line)
    except KeyboardInterrupt:
        return


def log_of(run: Path, stage: str | None, rank: int | None) -> Path:
    """The log to show: a rank's own, or its job's where none of its ranks has begun to write."""
    known = [entry.folder for entry in stages_of(run) if any((entry.folder / "logs").glob("*"))]
    folders = [folder for folder in known if folder.name == stage] if stage else known
    if not folders:
        told = ", ".join(folder.name for folder in known) or "none yet"
        raise ValueError(f"{run} has no logs{f' of {stage}' if stage else ''}; there are those of: {told}")
    newest = max(folders, key=lambda folder: max(path.stat().st_mtime for path in (folder / "logs").glob("*")))
    ranks = sorted(int(path.stem.removeprefix("rank_")) for path in (newest / "logs").glob("rank_[0-9]*.log"))
    if rank is not None and rank not in ranks:
        there = f"0 to {ranks[-1]}" if ranks else "none yet"
        raise ValueError(f"{newest.name} has no log of rank {rank}; there are: {there}")
    if ranks:
        return newest / "logs" / f"rank_{rank or 0}.log"
    return max((newest / "logs").glob("*"), key=lambda path: path.stat().st_mtime)


def followed(run: Path, stage: str | None, rank: int | None, path: Path, at: int) -> Iterator[str]:
    """Lines of that log from a byte on, as they are written, then of the next stage's when there is one; no end."""
    rest = ""
    while True:
        if path.stat().st_size < at:  # it was begun anew
            at, rest = 0, ""
        with path.open(encoding="utf-8", errors="replace") as file:
            file.seek(at)
            text = rest + file.read()
            at = file.tell()
        *lines, rest = text.split("\n")
        yield from lines
        if not lines:
            newer = log_of(run, stage, rank)
            if newer != path:
                path, at, rest = newer, 0, ""
                yield f"== {path}"
            else:
                time.sleep(_PAUSE)


def _show(*lines: str) -> None:
    for line in lines:
        print(line)
    sys.stdout.flush()
