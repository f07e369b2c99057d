"""A stage that trains as a job of the tests' SLURM, and assertions about how it ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch.slurm import attempt, preflight, submit
from models.processes import stat_fields
from tests.cluster.slurm_cluster import SlurmCluster
from tests.cluster.slurm_nodes import until
from trainer.recipes.reading import load_recipe
from trainer.recipes.schema import Config

FAULTS = Path(__file__).parent / "faults"
BATCH = 12
SETTINGS = (
    *("data.buckets=[]", "parallel.threads=1", "parallel.device=cpu", f"pretrain.global_batch={BATCH}"),
    *(
        "pretrain.decay=0",
        "pretrain.ema_halflife=200",
        f"log.every={BATCH}",
        "log.samples_every=0",
        "checkpoint.every=600",
    ),
)
LONG = 4800


class Run:
    """One run directory and the job that trains in it."""

    def __init__(self, cluster: SlurmCluster, folder: Path, latents: Path, *overrides: str, fault: Any = None) -> None:
        self.cluster, self.folder, self.stage = cluster, folder, folder / "pretrain"
        self.mark = folder.with_name(f"{folder.name}.mark")
        given = [*SETTINGS, f"run_dir={folder}", f"data.latents={latents}", "cluster=no_accounting"]
        given += [f"pretrain.samples={LONG}", "cluster.grace_seconds=30", "cluster.check_nodes=false", *overrides]
        if fault:
            fault = {"mark": str(self.mark), **fault}
            given += [f"cluster.environment.PYTHONPATH={FAULTS}", f"cluster.environment.SPRESSO_FAULT={_quoted(fault)}"]
        self.config: Config = load_recipe("tiny", given)

    def submit(self) -> str:
        """Submit the stage without preflight checks, which take as long as a test, and return the job's id."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(preflight, "check", lambda *_: None)
            [submitted] = submit.run(self.config, only="pretrain")
        self.job = submitted.job
        return self.job

    @property
    def samples(self) -> int:
        """The number of samples trained on by the last line of the log."""
        return max(self.curve(), default=0)

    def curve(self) -> dict[int, float]:
        """Return the logged losses by samples; fail if two lines have the same number of samples."""
        path, found = self.stage / "metrics.jsonl", dict[int, float]()
        for line in path.read_text().splitlines(keepends=True) if path.exists() else ():
            entry = json.loads(line) if line.endswith("\n") else {"kind": "torn"}
            if entry["kind"] == "train":
                assert entry["samples"] not in found, f"{entry['samples']} is there twice"
                found[entry["samples"]] = entry["loss"]
        return found

    def reach(self, samples: int, timeout: float = 90) -> None:
        """Wait until the log has reached `samples`."""
        self._until(lambda: self.samples >= samples, timeout, f"{samples} samples")

    def end(self, state: str = "COMPLETED", timeout: float = 150) -> None:
        """Wait until the job is in a state; fail with the run's logs if it does not get there."""
        try:
            self.cluster.wait_for(self.job, state, timeout)
        except Exception as error:
            raise AssertionError(f"{error}\n{self.told()}") from error

    def starts(self, count: int, timeout: float = 60) -> list[dict[str, Any]]:
        """Wait until `count` of the job's starts have ended, and return their entries in the attempt history."""
        self._until(lambda: len(self.ended()) >= count, timeout, f"{count} ended starts")
        return self.ended()

    def ended(self) -> list[dict[str, Any]]:
        """Return the attempt history's entries of the starts that have ended."""
        return [entry for entry in attempt.history(self.stage) if "then" in entry]

    def preempt(self, partition: str = "high", seconds: int = 2) -> str:
        """Submit a job that takes all nodes for some seconds, and return its id."""
        nodes = f"--nodes={len(self.cluster.names)}"
        return self.cluster.submit(
            f"--partition={partition}", nodes, "--exclusive", "--output=/dev/null", f"--wrap=sleep {seconds}"
        )

    def ranks(self) -> list[int]:
        """Return the PIDs of this machine's processes that train in this run directory, without their supervisors."""
        tasks = self.tasks()
        return [pid for pid in tasks if not tasks.keys() & {child for child, parent in tasks.items() if parent == pid}]

    def supervisors(self) -> list[int]:
        """Return the PIDs of the supervisors of the ranks that train."""
        tasks = self.tasks()
        return sorted({parent for parent in tasks.values() if parent in tasks})

    def rank(self, number: int) -> int:
        """Return the PID of a rank that trains."""
        return next(pid for pid in self.ranks() if f"SLURM_PROCID={number}".encode() in environment_of(pid))

    def tasks(self) -> dict[int, int]:
        """Return the parent of each process of this run's tasks, by PID."""
        found = {}
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words, fields = path.read_bytes().split(b"\0"), stat_fields(int(path.parent.name))
            except OSError:
                continue
            python = Path(os.fsdecode(words[0])).name.startswith("python")  # srun's own words name the module, too
            ours = python and b"launch.slurm.job_task" in words and f"SPRESSO_RUN={self.folder}".encode()
            if ours and fields and fields[0] != "Z" and ours in environment_of(int(path.parent.name)):
                found[int(path.parent.name)] = int(fields[1])
        return found

    def told(self) -> str:
        """Return the ends of the run's logs, to be shown when a test fails."""
        logs = sorted(self.stage.glob("logs/*")) + sorted(self.stage.glob("attempts/*.jsonl"))
        return "\n".join(f"== {log.name}\n{log.read_text()[-1500:]}" for log in logs)

    def _until(self, condition: Any, timeout: float, what: str) -> None:
        try:
            until(condition, timeout, what)
        except Exception as error:
            raise AssertionError(f"{error}\n{self.told()}") from error


def environment_of(pid: int) -> list[bytes]:
    """Return the variables that a process began with; [] if it has ended."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


def assert_undisturbed(run: Run, undisturbed: dict[int, float], samples: int = LONG) -> None:
    """Assert that the log has each step once, and each with the loss of the undisturbed run."""
    curve = run.curve()
    assert list(curve) == list(range(BATCH, samples + 1, BATCH))
    assert max(abs(curve[at] - undisturbed[at]) for at in curve) < 1e-5


def assert_nothing_lost(run: Run, start: dict[str, Any], seen: int) -> None:
    """Assert that a start was requeued with a checkpoint at `seen` samples or later."""
    assert start["then"] == "requeued"
    assert start["place"] >= seen


def spresso(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a `spresso` command in a process of its own, as a user does."""
    command = [sys.executable, "-m", "launch.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, env=os.environ | {}, **options)


def _quoted(fault: dict[str, Any]) -> str:
    """Return the fault as JSON in quotes, so that YAML reads it as a string."""
    return "'" + json.dumps(fault).replace("'", "''") + "'"
