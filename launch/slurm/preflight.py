"""Checks before a submission: finds what would fail only after a job has waited in the queue.

On the submitting machine: the data, the disk space, the store, the checkpoints to resume from, and whether sbatch
accepts the jobs. On a compute node, if one is free at once (`launch.slurm.node_check`): whether the code can be
imported, and whether the run directory and the GPUs are found.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from launch.pipeline import say
from launch.slurm.job_script import Job, flags
from models.readable import describe_os_error
from trainer.checkpoints import checkpoint
from trainer.checkpoints.disk_space import checkpoint_bytes
from trainer.checkpoints.manifest import OtherFormatError
from trainer.checkpoints.names import checkpoints
from trainer.formatting import size
from trainer.recipes.cluster import option_name
from trainer.recipes.schema import Config
from trainer.run_directory import RunDirectory, stage_folder
from trainer.stage_inputs import stage_inputs
from trainer.stages import STAGES
from trainer.stores.store import trouble

_AT_ONCE = 15  # seconds to wait for a free node
_PATIENCE = 180.0  # seconds for the check on the node, which imports torch
_WHERE = ("gres", "reservation", "nodelist", "exclude")  # options of sbatch that select nodes


def check(config: Config, stages: Sequence[str], submission: Path, jobs: Sequence[Job]) -> None:
    """Check a submission, and print which checks were impossible.

    Args:
        config: the recipe.
        stages: stages to submit.
        submission: folder with their code, which is removed if a check fails.
        jobs: jobs of these stages, in order.

    Raises:
        ValueError: the message has a line for every problem.
    """
    check_all([(config, stages)], submission, jobs, inputs=_data(config, stages))


def check_all(
    runs: Sequence[tuple[Config, Sequence[str]]], submission: Path, jobs: Sequence[Job], *, inputs: Iterable[str] = ()
) -> None:
    """Check the submission of several runs, each with its stages, as `check` does for one.

    `inputs` are the problems of the inputs that must exist already. Raises ValueError.
    """
    found = [*inputs, *(line for run in runs for line in _checkpoints(*run)), *_disk(runs), *_store(runs[0][0])]
    try:
        for job in jobs:
            found += _accepted(job)
    except ValueError as error:  # sbatch gives no answer, so no other job is tried
        found.append(str(error))
    if not found:
        problem, unchecked = _on_a_node(max(jobs, key=lambda job: job.cluster.gpus_per_node))
        found += [problem] if problem else []
        if unchecked:
            say(f"  {unchecked}")
    if found:
        shutil.rmtree(submission)
        raise ValueError("\n".join(found))


def _data(config: Config, stages: Sequence[str]) -> Iterator[str]:
    """Yield what is wrong with the inputs of the first stage."""
    if STAGES[stages[0]].trained:
        try:
            stage_inputs(config, stages[0])
        except (ValueError, OSError) as error:
            yield str(error)


def _checkpoints(config: Config, stages: Sequence[str]) -> Iterator[str]:
    """Yield what is wrong with the checkpoints that the stages would resume from."""
    for stage in stages:
        if not STAGES[stage].trained:
            continue
        directory = RunDirectory(stage_folder(config, stage), stage)
        try:
            there = checkpoints(directory.checkpoints)
            checkpoint.newest(directory.checkpoints)
        except checkpoint.NoWholeCheckpointError:
            if config.checkpoint.resume == "auto":
                yield f"no checkpoint of {directory.path} is intact: see `spresso checkpoint {directory.path} --verify`"
            continue
        except OtherFormatError as error:
            yield str(error)
            continue
        except OSError as error:
            yield f"the checkpoints of {directory.path} can't be read now: {describe_os_error(error)}"
            continue
        if there and config.checkpoint.resume == "never":
            yield f"{directory.path} holds a run, and checkpoint.resume=never: set another run_dir, or remove it"


def _disk(runs: Sequence[tuple[Config, Sequence[str]]]) -> Iterator[str]:
    """Yield a line if the checkpoints do not fit on the disk."""
    needed = sum(
        checkpoint_bytes(config, stage) for config, stages in runs for stage in stages if STAGES[stage].trained
    )
    folder = Path(runs[0][0].run_dir).resolve()
    free = shutil.disk_usage(folder).free
    if needed > free:
        yield (
            f"{folder} has {size(free)} free, but the checkpoints need {size(needed)}: free some space, or set "
            f"another run_dir"
        )


def _store(config: Config) -> Iterator[str]:
    """Yield a line if the store takes no upload."""
    if config.checkpoint.upload is not None and (problem := trouble(config.checkpoint.upload)):
        yield problem


def _accepted(job: Job) -> Iterator[str]:
    """Yield why sbatch refuses a job, without starting the job. Raises ValueError if sbatch gives no answer."""
    lines = [line for line in job.text.split("\n") if not line.startswith("#SBATCH --dependency")]
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
    """Check a compute node; return what is wrong, and why the check was impossible. Either is empty."""
    cluster = job.cluster
    wanted = {key: getattr(cluster, key) for key in ("partition", "account", "qos", "constraint")}
    options = [f"--{key}={value}" for key, value in wanted.items() if value is not None]
    given = {option_name(key): value for key, value in cluster.options.items()}
    options += flags({key: value for key, value in given.items() if key in _WHERE} | cluster.srun)
    if cluster.gpus_per_node and "gres" not in given:
        options.append("--gpus-per-node=1")
    check = f"{cluster.ranks_python} -m launch.slurm.node_check {int(cluster.gpus_per_node > 0)}"
    lines = [*job.parameters["setup"], f"exec {check}"]
    command = ["srun", "--nodes=1", "--ntasks=1", "--time=5", f"--immediate={_AT_ONCE}", "--job-name=spresso-check"]
    try:
        done = subprocess.run(
            [*command, *options, "bash", "-c", "\n".join(lines)], capture_output=True, text=True, timeout=_PATIENCE
        )
    except subprocess.TimeoutExpired:
        return "", f"not checked on a compute node: no answer within {_PATIENCE:.0f} s"
    if "spresso: all is there" in done.stdout:
        return "", ""
    if "spresso: missing" in done.stdout:
        return done.stdout.partition("spresso: missing")[2].strip(), ""
    if "llocat" in done.stderr and "spresso" not in done.stdout:  # Unable to allocate resources
        return "", f"not checked on a compute node: none was free within {_AT_ONCE} s"
    return f"the check on a compute node failed: {' '.join((done.stderr or done.stdout).split())[-400:]}", ""
