"""Foreign lines in a job's records stop neither its requeue nor its next start."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

from launch import owner
from launch.slurm import begin_end, scheduler, submitted_jobs
from launch.slurm.attempt import TOKEN, history
from tests.damage import VALUES, Document, remove
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


def damage_owner(folder: Path, seed: int) -> None:
    """Make the record of the owner one that names none."""
    path = folder / "pretrain" / "owner.json"
    try:
        before = owner.holder(folder / "pretrain")
    except ValueError:  # it is damaged already
        return
    if before is None:
        return
    content = path.read_bytes()
    for attempt in range(100):
        Document(path).damage(random.Random(f"{seed} {attempt}"))
        try:
            held = owner.holder(folder / "pretrain")
        except ValueError:
            return
        except OSError:  # a link to itself, which is no content of a record
            held = before
        assert held is None or held.token == before.token, "a damaged record names another owner"
        remove(path)
        path.write_bytes(content)
    raise AssertionError("no damage was seen")


def test_a_damaged_owner_stops_no_requeue(tmp_path, asked, monkeypatch, mutant_counts):
    monkeypatch.setattr(scheduler, "alive", lambda jobs: jobs)
    for seed in range(30):
        mutant_counts.begin("damaged owners of jobs")
        folder = tmp_path / str(seed)
        for restart in range(2):
            damage_owner(folder, 10 * seed + restart)
            assert begin_end._begin(start(folder, restart)) == 0
            monkeypatch.setenv(TOKEN, f"12_{restart}")
            owner.require(folder / "pretrain")
            damage_owner(folder, 10 * seed + 5 + restart)
            owner.require(folder / "pretrain")
            start(folder, restart).note(0, "stopped", why="was preempted")
            assert begin_end._end(start(folder, restart), 0) == 0
        assert asked == [("requeue", "12")] * 2
        assert len([*(folder / "pretrain").glob("owner.json.*.damaged")]) == 1
        asked.clear()
        mutant_counts.end("damaged owners of jobs", refused=False)


def test_another_owner_is_still_heeded(tmp_path, asked):
    assert begin_end._begin(start(tmp_path, 0)) == 0
    assert begin_end._begin(start(tmp_path, 1)) == 0
    start(tmp_path, 0).note(0, "stopped", why="was preempted")
    assert begin_end._end(start(tmp_path, 0), 0) == 0
    assert asked == []


def test_a_person_is_asked_about_a_damaged_owner(tmp_path):
    (tmp_path / "owner.json").write_text("{")
    with pytest.raises(ValueError, match=r"owner\.json is damaged .* remove it if nothing trains there"):
        owner.take(tmp_path, owner.by_hand())


@pytest.mark.parametrize("launcher", ["SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"])
def test_a_stage_that_a_job_runs_without_ranks_takes_a_damaged_owner(tmp_path, monkeypatch, launcher):
    monkeypatch.setenv(launcher, "12")
    (tmp_path / ".owner.json").write_text("{")
    with owner.holding(tmp_path):
        assert (tmp_path / ".owner.json").read_text() != "{"
    assert [path.suffix for path in tmp_path.glob(".owner.json.*")] == [".damaged"]


def test_foreign_lines_stop_no_requeue(tmp_path, asked, mutant_counts):
    for seed in range(20):
        mutant_counts.begin("foreign lines in records of jobs")
        goes_on(tmp_path / str(seed), asked, random.Random(seed))
        mutant_counts.end("foreign lines in records of jobs", refused=False)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_a_list_of_jobs_that_is_no_file_stops_no_start(tmp_path, asked, capsys, make):
    make(tmp_path / "jobs.jsonl")
    assert begin_end._begin(start(tmp_path)) == 0
    assert "`spresso status` will not show this job" in capsys.readouterr().err
