"""What would fail later, found before a job waits in the queue for it.

On the machine that submits: data, disk, the checkpoint to go on from, what sbatch thinks of the jobs. On a compute
node, where one is free at once: whether the code imports there, sees the run directory, and finds the GPUs, which
`launch.slurm.node_check` says.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from launch.pipeline import say
from launch.slurm.job_script import Job, flags
from trainer.checkpoints import checkpoint
from trainer.checkpoints.disk_space import checkpoint_bytes
from trainer.checkpoints.names import checkpoints
from trainer.formatting import size
from trainer.recipes.schema import Config
from trainer.run_directory import RunDirectory, stage_folder
from trainer.stage_inputs import stage_inputs
from trainer.stages import STAGES

_AT_ONCE = 15  # seconds to wait for a node that is free
_PATIENCE = 180.0  # seconds for the imports there
_WHERE = ("gres", "reservation", "nodelist", "exclude")  # options of sbatch that say on which nodes


def check(config: Config, stages: Sequence[str], submission: Path, jobs: Sequence[Job]) -> None:
    """Raise ValueError with all that is wrong, a line each; says what could not be looked at.

    Args:
        config: the whole recipe.
        stages: those to be handed over.
        submission: where their code lies.
        jobs: of those stages, in order.
    """
    found = [*_data(config, stages), *_checkpoints(config, stages), *_disk(config, stages)]
    try:
        for job in jobs:
            found += _accepted(job)
    except ValueError as error:  # no answer to any of them
        found.append(str(error))
    if not found:
        problem, unseen = _on_a_node(max(jobs, key=lambda job: job.cluster.gpus_per_node))
        found += [problem] if problem else []
        if unseen:
            say(f"  {unseen}")
    if found:
        shutil.rmtree(submission)
        raise ValueError("\n".join(found))


def _data(config: Config, stages: Sequence[str]) -> Iterator[str]:
    """What the first stage builds on."""
    if STAGES[stages[0]].trained:
        try:
            stage_inputs(config, stages[0])
        except (ValueError, OSError) as error:
            yield str(error)


def _checkpoints(config: Config, stages: Sequence[str]) -> Iterator[str]:
    """What the stages would go on from."""
    for stage in stages:
        if not STAGES[stage].trained:
            continue
        directory = RunDirectory(stage_folder(config, stage), stage)
        there = checkpoints(directory.checkpoints)
        if there and checkpoint.newest(directory.checkpoints) is None:
            yield f"no checkpoint of {directory.path} is whole: `spresso checkpoint {directory.path} --verify` says why"
        if there and config.checkpoint.resume == "never":
            yield f"{directory.path} holds a run, and checkpoint.resume=never: take another run_dir=…, or leave it out"


def _disk(config: Config, stages: Sequence[str]) -> Iterator[str]:
    """Whether the checkpoints fit."""
    needed = sum(checkpoint_bytes(config, stage) for stage in stages if STAGES[stage].trained)
    folder = Path(config.run_dir).resolve()
    free = shutil.disk_usage(folder).free
    if needed > free:
        yield (
            f"{folder} has {size(free)} free, and the checkpoints take {size(needed)}: free some, or take another "
            f"run_dir=…"
        )


def _accepted(job: Job) -> Iterator[str]:
    """What sbatch says of a job that it is not to start."""
    lines = [line for line in job.text.splitlines() if not line.startswith("#SBATCH --dependency")]
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
        file.write("\n".join(lines))
        file.flush()
        try:
            done = subprocess.run(["sbatch", "--test-only", file.name], capture_output=True, text=True, timeout=60)
        except FileNotFoundError:
            raise ValueError("there is no sbatch here: run this on a login node of the cluster") from None
        except subprocess.TimeoutExpired:
            raise ValueError("sbatch gives no answer: is the controller down?") from None
    if done.returncode:
        yield f"sbatch refuses the job of {', '.join(job.stages)}: {' '.join(done.stderr.split())}"


def _on_a_node(job: Job) -> tuple[str, str]:
    """What is wrong on a compute node; and what could not be seen."""
    cluster = job.cluster
    wanted = {key: getattr(cluster, key) for key in ("partition", "account", "qos", "constraint")}
    options = [f"--{key}={value}" for key, value in wanted.items() if value is not None]
    given = {key.replace("_", "-"): value for key, value in cluster.options.items()}
    options += flags({key: value for key, value in given.items() if key in _WHERE} | cluster.srun)
    if cluster.gpus_per_node and "gres" not in given:
        options.append("--gpus-per-node=1")
    python = cluster.python or shlex.quote(sys.executable)
    lines = [*job.parameters["setup"], f"exec {python} -m launch.slurm.node_check {int(cluster.gpus_per_node > 0)}"]
    command = ["srun", "--nodes=1", "--ntasks=1", "--time=5", f"--immediate={_AT_ONCE}", "--job-name=spresso-check"]
    try:
        done = subprocess.run(
            [*command, *options, "bash", "-c", "\n".join(lines)], capture_output=True, text=True, timeout=_PATIENCE
        )
    except subprocess.TimeoutExpired:
        return "", f"not looked at on a compute node: no answer in {_PATIENCE:.0f} s"
    if "spresso: all is there" in done.stdout:
        return "", ""
    if "spresso: missing" in done.stdout:
        return done.stdout.partition("spresso: missing")[2].strip(), ""
    if "llocat" in done.stderr and "spresso" not in done.stdout:  # Unable to allocate resources
        return "", f"not looked at on a compute node: none was free within {_AT_ONCE} s"
    return f"the check on a compute node failed: {' '.join((done.stderr or done.stdout).split())[-400:]}", ""
