"""Measure how fast a preempted job ends and resumes: python benchmarks/recovery.py [--rounds N] [--json FILE].

The benchmark starts the tests' SLURM cluster on this machine and trains the same model on two nodes of two ranks twice:
as this project's job, and as a plain Accelerate loop (`save_state`, `load_state`) that submitit's own protocol
checkpoints and requeues. In each round it sends SIGUSR2 to the job's tasks, as SLURM does before a time limit, and
measures two times: from the signal until the job has left its nodes and is pending again, and from the moment that the
job runs again until its first step ends. It prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import ranks
from ranks import ROOT, say
from recovery_peer import RECIPE, Loop
from subject import STAGE, make_base, make_latents, recipe

from tests.cluster.slurm_cluster import SlurmCluster
from trainer.recipes.schema import Config

NODES, TASKS, STEPS = 2, 2, 12
OURS, PEER = "this project", "Accelerate and submitit"


class Job(ABC):
    """A training job on the cluster, which can be preempted and timed."""

    job: str

    def __init__(self, cluster: SlurmCluster) -> None:
        self.cluster = cluster

    @abstractmethod
    def steps(self) -> list[tuple[int, float]]:
        """Return the number and the Unix time of each step in the job's log, oldest first."""

    def round(self) -> dict[str, float]:
        """Preempt the job once and wait until it trains again.

        Returns:
            `leave`: seconds from the signal until the job is pending; `return`: seconds from its restart to the end of
            its first step; `lost`: steps that had to be trained again.
        """
        begun = self._steps_after(0.0)
        self._until(lambda: len(self._steps_after(begun[0][1] if begun else 0.0)) >= STEPS)
        signalled = time.time()
        self.cluster.command("scancel", "--signal=USR2", self.job)
        self._until(lambda: self.cluster.state(self.job) == "PENDING")
        left = time.time()
        last = self.steps()[-1][0]
        self._until(lambda: self.cluster.state(self.job) == "RUNNING")
        running = time.time()
        self._until(lambda: bool(self._steps_after(running)))
        number, at = self._steps_after(running)[0]
        return {"leave": left - signalled, "return": at - running, "lost": last + 1 - number}

    def _steps_after(self, moment: float) -> list[tuple[int, float]]:
        return [step for step in self.steps() if step[1] > moment]

    def _until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 180
        while not condition():
            if time.monotonic() > end:
                raise SystemExit(f"{type(self).__name__}: no progress in 180 s: {self.cluster.job(self.job)}")
            time.sleep(0.1)


class Ours(Job):
    """This project's job, as `spresso train RECIPE stage=… cluster=…` submits it."""

    def __init__(self, cluster: SlurmCluster, config: Config) -> None:
        super().__init__(cluster)
        from launch.slurm import preflight, submit

        preflight.check = lambda *_: None  # the recipe is known to be right, and the checks take long
        self.folder, self.batch = Path(config.run_dir) / STAGE, config.stage(STAGE).global_batch
        [submitted] = submit.run(config, only=STAGE)
        self.job = submitted.job

    def steps(self) -> list[tuple[int, float]]:
        path = self.folder / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [(line["samples"] // self.batch, line["time"]) for line in lines if line["kind"] == "train"]


class Peer(Job):
    """The loop of `recovery_peer.py`, as a submitit job."""

    def __init__(self, cluster: SlurmCluster, folder: Path) -> None:
        super().__init__(cluster)
        import submitit

        self.log = folder / "peer" / "steps.jsonl"
        executor = submitit.AutoExecutor(folder / "peer", cluster="slurm")
        executor.update_parameters(
            nodes=NODES,
            tasks_per_node=TASKS,
            timeout_min=600,
            slurm_additional_parameters={"requeue": True},
            slurm_setup=[f"export PYTHONPATH={ROOT}:{ROOT / 'benchmarks'}", "export OMP_NUM_THREADS=1"],
        )
        self.job = executor.submit(Loop(folder)).job_id

    def steps(self) -> list[tuple[int, float]]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [(entry["step"], entry["time"]) for entry in map(json.loads, lines)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="a file to write the figures to")
    parser.add_argument("--rounds", type=int, default=5, help="how often each job is preempted (default: %(default)s)")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="spresso-benchmark-"))
    try:
        figures = measure(work, options.rounds)
    finally:
        shutil.rmtree(work)
    print(table(figures))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def measure(work: Path, rounds: int) -> dict[str, Any]:
    """Preempt both jobs `rounds` times, one job after the other on one cluster, and return all figures."""
    import os

    cluster_settings = ("cluster=no_accounting", f"cluster.nodes={NODES}", f"cluster.tasks_per_node={TASKS}")
    config = recipe(work, *RECIPE, *cluster_settings, "cluster.grace_seconds=60")
    frozen = make_base(work, config)
    make_latents(work, config)
    figures = ranks.conditions("torch", "accelerate", "submitit") | {"frozen": frozen, "systems": {}}
    with SlurmCluster() as cluster:
        os.environ |= cluster.environment
        makers: dict[str, Callable[[], Job]] = {
            OURS: lambda: Ours(cluster, config),
            PEER: lambda: Peer(cluster, work),
        }
        for name, make in makers.items():
            job = make()
            figures["systems"][name] = found = []
            for number in range(rounds):
                found.append(job.round())
                say(f"{name}: round {number + 1} of {rounds}: {found[-1]}")
            cluster.command("scancel", job.job)
            job._until(lambda: cluster.state(job.job) == "CANCELLED")  # noqa: B023
    return figures


def table(figures: dict[str, Any]) -> str:
    """Return the figures as a Markdown table, the median and the worst round of each."""
    lines = [
        f"{ranks.describe(figures)} SLURM on this machine (KillWait 5 s, a requeued job may start after 6 s), {NODES} "
        f"nodes of {TASKS} ranks of a thread each; {figures['frozen'] / 1e6:.1f} M frozen parameters. Each median and "
        f"worst.",
        "",
        "| | signal to clean end, s | start to first new step, s | steps lost |",
        "|---|---|---|---|",
    ]
    for name, rounds in figures["systems"].items():
        cells = [
            f"{statistics.median(each[key] for each in rounds):.1f} / {max(each[key] for each in rounds):.1f}"
            for key in ("leave", "return", "lost")
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
