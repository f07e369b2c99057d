"""Foreign lines in a job's records stop neither its requeue nor its next start."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

from launch import owner
from launch.slurm import begin_end, submitted_jobs
from launch.slurm.attempt import history
from tests.damage import VALUES
from tests.launch.slurm.test_begin_end_history import asked, start

__all__ = ["asked"]


def foreign_line(chance: random.Random) -> bytes:
    """Return a line that no version of spresso writes."""
    value = chance.choice(VALUES)
    fields = ("job", "restart", "began", "ended", "place", "then", "why", "failure", "by", "stage", "log", "time")
    lines = (
        json.dumps(value).encode(),
        json.dumps({name: chance.choice(VALUES) for name in chance.sample(fields, 4)}).encode(),
        json.dumps({"job": "12", "restart": 0, chance.choice(fields): value}).encode(),
        chance.randbytes(50).replace(b"\n", b""),
        b'{"job": "12", "restart": 0, "ended"',
        "{}".encode("utf-16"),
        b"[" * 100_000,
        b"9" * 10_000,
        b"a" * (2 << 20),
        b"<<<<<<< HEAD",
    )
    return chance.choice(lines)


def add_foreign_lines(path: Path, chance: random.Random) -> None:
    lines = [line + b"\n" for line in path.read_bytes().split(b"\n") if line] if path.exists() else []
    for _ in range(chance.randrange(1, 4)):
        lines.insert(chance.randrange(len(lines) + 1), foreign_line(chance) + b"\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(lines).removesuffix(b"\n" if chance.random() < 0.3 else b""))


def goes_on(folder: Path, asked: list[tuple[str, ...]], chance: random.Random) -> None:
    """Start a job, let it be preempted, and start it again, with foreign lines added before each part."""
    records = [folder / "jobs.jsonl", folder / "pretrain" / "attempts" / "history.jsonl"]
    for restart in range(2):
        for path in records:
            add_foreign_lines(path, chance)
        assert begin_end._begin(start(folder, restart)) == 0
        for path in records:
            add_foreign_lines(path, chance)
        start(folder, restart).note(0, "stopped", why="was preempted")
        assert begin_end._end(start(folder, restart), 0) == 0
        assert owner.holder(folder / "pretrain").token == f"12_{restart}"
    assert asked == [("requeue", "12")] * 2
    own = [entry for entry in history(folder / "pretrain") if entry["job"] == "12" and "count" in entry]
    assert [entry["restart"] for entry in own] == [0, 1]
    assert submitted_jobs.undamaged(folder)["pretrain"].job == "12"
    asked.clear()


def test_foreign_lines_stop_no_requeue(tmp_path, asked):
    for seed in range(20):
        goes_on(tmp_path / str(seed), asked, random.Random(seed))


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_a_list_of_jobs_that_is_no_file_stops_no_start(tmp_path, asked, capsys, make):
    make(tmp_path / "jobs.jsonl")
    assert begin_end._begin(start(tmp_path)) == 0
    assert "`spresso status` will not show this job" in capsys.readouterr().err
