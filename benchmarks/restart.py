"""Measure how fast a killed rank trains again: python benchmarks/restart.py [--rounds N] [--json FILE].

The benchmark starts the tests' SLURM cluster on this machine and trains a tiny model on two nodes of two ranks. In each
round it kills a rank with SIGKILL at a random step, and measures the time until the next optimizer step has ended: once
where the ranks restart in the job, and once where the job is requeued (`cluster.restarts_in_job=0`). The yardstick is
`import torch` in a fresh process, measured before and after each job, when nothing else runs on the cluster; and in as
many tasks of srun at once as the job has, which is what a requeued job pays. It prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import ranks
from ranks import say
from recovery import Ours
from subject import make_base, make_latents, recipe

from tests.cluster.runs import Run
from tests.cluster.slurm_cluster import SlurmCluster

NODES, TASKS, BATCH, EVERY, IMPORTS = 2, 2, 16, 10, 4
RECIPE = (
    *("dit.heads=2", "latent_encoder.heads=2", "latent_encoder.encoder_depth=1"),
    *(f"autoencode.global_batch={BATCH}", "autoencode.samples=100000000", f"log.every={BATCH}", "log.samples_every=0"),
    *(f"checkpoint.every={BATCH * EVERY}", "checkpoint.least_steps=1"),
    *("cluster=no_accounting", f"cluster.nodes={NODES}", f"cluster.tasks_per_node={TASKS}"),
    *("cluster.grace_seconds=60", "parallel.device=cpu", "cluster.check_nodes=false"),
)
WAYS = {"restarted in the job": 1000, "requeued": 0}
"""What happens → `cluster.restarts_in_job`."""
_IMPORT = "import time; begun = time.perf_counter(); import torch; print(time.perf_counter() - begun)"


class Killed(Ours):
    """A training job whose ranks are killed, one at a time."""

    def pids(self) -> list[int]:
        """Return the PIDs of the ranks that train."""
        found = Run.__new__(Run)
        found.folder = self.folder.parent
        return found.ranks()

    def kill(self, chance: random.Random) -> float:
        """Kill a random rank at a random step beyond the next checkpoint; return the seconds until the next step."""
        self._until(lambda: self._began() > 0)
        seen = self._began()
        goal = [number for number, at in self.steps() if at > seen]
        target = (goal[0] if goal else 0) + EVERY + chance.randrange(1, EVERY)
        self._until(lambda: any(number >= target and at > seen for number, at in self.steps()))
        time.sleep(chance.random() * 0.2)
        victim = chance.choice(self.pids())
        os.kill(victim, signal.SIGKILL)
        killed = time.time()
        self._until(lambda: self._began() > seen)
        begun = self._began()
        self._until(lambda: bool(self._steps_after(begun)))
        return self._steps_after(begun)[0][1] - killed

    def _began(self) -> float:
        path = self.folder / "attempts" / "history.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return max((line["began"] for line in lines if "began" in line), default=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="a file to write the figures to")
    parser.add_argument("--rounds", type=int, default=10, help="how often a rank is killed (default: %(default)s)")
    parser.add_argument("--requeues", type=int, default=3, help="the same for the job that is requeued")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="spresso-benchmark-"))
    try:
        figures = measure(work, (options.rounds, options.requeues), options.seed)
    finally:
        shutil.rmtree(work)
    print(table(figures))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def measure(work: Path, rounds_of_ways: tuple[int, int], seed: int) -> dict[str, Any]:
    """Kill ranks of both jobs so many times, one job after the other on one cluster, and return all figures."""
    chance = random.Random(seed)
    make_base(work, recipe(work, *RECIPE))
    make_latents(work, recipe(work, *RECIPE))
    figures = ranks.conditions("torch") | {"alone": [], "at once": [], "ways": {}}
    with SlurmCluster() as cluster:
        os.environ |= cluster.environment
        _imports(cluster, figures)
        for (name, most), rounds in zip(WAYS.items(), rounds_of_ways, strict=True):
            if not rounds:
                continue
            config = recipe(work, *RECIPE, f"run_dir={work / str(most)}", f"cluster.restarts_in_job={most}")
            job = Killed(cluster, config)
            figures["ways"][name] = found = []
            for number in range(rounds):
                found.append(job.kill(chance))
                say(f"{name}: round {number + 1} of {rounds}: {found[-1]:.2f} s")
            cluster.command("scancel", job.job)
            job._until(lambda: cluster.state(job.job) == "CANCELLED")  # noqa: B023
            cluster.wait_ready(60)
            _imports(cluster, figures)
    return figures


def _imports(cluster: SlurmCluster, figures: dict[str, Any]) -> None:
    """Measure `import torch` in a fresh process, and in all tasks of a job at once, some times each."""
    for count, key in ((1, "alone"), (NODES * TASKS, "at once")):
        for _ in range(IMPORTS):
            words = ["srun", f"--nodes={min(count, NODES)}", f"--ntasks={count}", sys.executable, "-c", _IMPORT]
            done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
            figures[key].append(max(map(float, done.stdout.split())))


def table(figures: dict[str, Any]) -> str:
    """Return the figures as a Markdown table."""
    alone, together = statistics.median(figures["alone"]), statistics.median(figures["at once"])
    lines = [
        f"{ranks.describe(figures)} SLURM on this machine (a requeued job may start after 6 s), {NODES} nodes of "
        f"{TASKS} ranks of a thread each; a rank is killed at a random step. `import torch` in a fresh process takes "
        f"{alone:.2f} s ({min(figures['alone']):.2f} to {max(figures['alone']):.2f}), in {NODES * TASKS} tasks at once "
        f"{together:.2f} s ({min(figures['at once']):.2f} to {max(figures['at once']):.2f}).",
        "",
        "| | kills | kill to next step, s: median | least | most | ÷ `import torch` | ÷ in all tasks at once |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in figures["ways"].items():
        middle = statistics.median(found)
        cells = (name, len(found), f"{middle:.2f}", f"{min(found):.2f}", f"{max(found):.2f}", f"{middle / alone:.2f}")
        lines.append(f"| {' | '.join(map(str, cells))} | {middle / together:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
