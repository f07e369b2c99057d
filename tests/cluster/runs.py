"""A stage as a job of the tests' SLURM, and what became of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch.slurm import attempt, preflight, submit
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
    """One run directory, trained by jobs."""

    def __init__(self, cluster: SlurmCluster, folder: Path, latents: Path, *overrides: str, fault: Any = None) -> None:
        self.cluster, self.folder, self.stage = cluster, folder, folder / "pretrain"
        self.mark = folder.with_name(f"{folder.name}.mark")
        given = [*SETTINGS, f"run_dir={folder}", f"data.latents={latents}", "cluster=no_accounting"]
        given += [f"pretrain.samples={LONG}", "cluster.grace_seconds=30", *overrides]
        if fault:
            fault = {"mark": str(self.mark), **fault}
            given += [f"cluster.environment.PYTHONPATH={FAULTS}", f"cluster.environment.SPRESSO_FAULT={_quoted(fault)}"]
        self.config: Config = load_recipe("tiny", given)

    def submit(self) -> str:
        """Hand it over, without a look ahead, which takes as long as the test; returns the job's number."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(preflight, "check", lambda *_: None)
            [submitted] = submit.run(self.config, only="pretrain")
        self.job = submitted.job
        return self.job

    @property
    def samples(self) -> int:
        """Seen, as far as its log says."""
        return max(self.curve(), default=0)

    def curve(self) -> dict[int, float]:
        """Losses by samples seen; fails where a line is there twice."""
        path, found = self.stage / "metrics.jsonl", dict[int, float]()
        for line in path.read_text().splitlines(keepends=True) if path.exists() else ():
            entry = json.loads(line) if line.endswith("\n") else {"kind": "torn"}
            if entry["kind"] == "train":
                assert entry["samples"] not in found, f"{entry['samples']} is there twice"
                found[entry["samples"]] = entry["loss"]
        return found

    def reach(self, samples: int, timeout: float = 90) -> None:
        """Until so many samples were seen."""
        self._until(lambda: self.samples >= samples, timeout, f"{samples} samples")

    def end(self, state: str = "COMPLETED", timeout: float = 150) -> None:
        """Until the job is in that state."""
        try:
            self.cluster.wait_for(self.job, state, timeout)
        except Exception as error:
            raise AssertionError(f"{error}\n{self.told()}") from error

    def starts(self, count: int, timeout: float = 60) -> list[dict[str, Any]]:
        """What became of the job's starts, once so many have ended."""
        self._until(lambda: len(self.ended()) >= count, timeout, f"{count} ended starts")
        return self.ended()

    def ended(self) -> list[dict[str, Any]]:
        """Of the starts that have ended."""
        return [entry for entry in attempt.history(self.stage) if "then" in entry]

    def preempt(self, partition: str = "high", seconds: int = 2) -> str:
        """Take all nodes for something more important; returns its number."""
        nodes = f"--nodes={len(self.cluster.names)}"
        return self.cluster.submit(
            f"--partition={partition}", nodes, "--exclusive", "--output=/dev/null", f"--wrap=sleep {seconds}"
        )

    def ranks(self) -> list[int]:
        """Processes of this machine that train here."""
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                environment = path.read_bytes().split(b"\0")
                words = (path.parent / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if f"SPRESSO_RUN={self.folder}".encode() in environment and b"launch.slurm.job_task" in words:
                found.append(int(path.parent.name))
        return found

    def told(self) -> str:
        """All that its logs say, for a test that fails."""
        logs = sorted(self.stage.glob("logs/*")) + sorted(self.stage.glob("attempts/*.jsonl"))
        return "\n".join(f"== {log.name}\n{log.read_text()[-1500:]}" for log in logs)

    def _until(self, condition: Any, timeout: float, what: str) -> None:
        try:
            until(condition, timeout, what)
        except Exception as error:
            raise AssertionError(f"{error}\n{self.told()}") from error


def assert_undisturbed(run: Run, undisturbed: dict[int, float], samples: int = LONG) -> None:
    """Every step once, none left out, and each loss as if nothing had happened."""
    curve = run.curve()
    assert list(curve) == list(range(BATCH, samples + 1, BATCH))
    assert max(abs(curve[at] - undisturbed[at]) for at in curve) < 1e-5


def assert_nothing_lost(run: Run, start: dict[str, Any], seen: int) -> None:
    """A start ended with a checkpoint that is no older than what its log had said."""
    assert start["then"] == "requeued"
    assert start["place"] >= seen


def spresso(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command, as a user gives it."""
    command = [sys.executable, "-m", "launch.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, env=os.environ | {}, **options)


def _quoted(fault: dict[str, Any]) -> str:
    """As a value that YAML takes for a text."""
    return "'" + json.dumps(fault).replace("'", "''") + "'"
