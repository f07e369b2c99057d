"""Submits a run to SLURM: copies its code and config, submits one job per stage, and records the job ids.

A job uses the files under `submissions/N/` of the run directory: `code/`, a copy of this code, so that editing a
checkout does not change queued jobs; `config.yaml`; and the scripts. `jobs.jsonl` in the run directory has a line for
each submitted job.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from launch import owner
from launch.pipeline import require_own_preparation, say, shared_latents
from launch.slurm import preflight, scheduler
from launch.slurm.job_script import Job, require_writable
from launch.slurm.submitted_jobs import Submitted, keep, submitted
from trainer.provenance import COPIED_FROM, code_version, local_changes
from trainer.recipes.cluster import ClusterConfig
from trainer.recipes.reading import RECIPES
from trainer.recipes.schema import Config
from trainer.recipes.values import to_yaml
from trainer.run_directory import RunDirectory, require_own_config, stage_folder, write_config
from trainer.stages import STAGES

_PACKAGES = ("models", "trainer", "launch", "configs")


def run(config: Config, *, only: str | None = None) -> list[Submitted]:
    """Submit the stages that are not done, each waiting for the previous one; `only`: a single stage.

    Raises:
        ValueError: a check failed, a job of the run is alive, or SLURM refuses a job; no job is left in the queue.
    """
    stages = _stages(config, only)
    if not stages:
        say("all stages are done")
        return []
    root = Path(config.run_dir).resolve()
    require_writable(config.name, root)
    require_own_config(root)
    with owner.holding(root):  # two submissions at one moment would both find the run idle
        return _submit(config, stages, root)


def _submit(config: Config, stages: Sequence[str], root: Path) -> list[Submitted]:
    require_idle(root, stages)
    submission = _copy_code_and_config(config, root)
    preflight.check(config, stages, submission, _jobs(config, stages, root, submission))
    handed_over: list[Submitted] = []
    try:
        for stage in stages:
            after = [handed_over[-1].job] if handed_over else []
            job = _job(config, [stage], root, submission, after)
            number = job.hand_over()
            handed_over.append(Submitted(stage, number, str(submission), str(job.log), time.time()))
            say(f"  {stage}: job {number}{f' after {after[0]}' if after else ''}, {describe_request(job.cluster)}")
    except BaseException:  # also a full disk or Ctrl-C
        if handed_over:
            scheduler.cancel(*(item.job for item in handed_over))
        raise
    keep(root, handed_over)
    write_config(root, config)
    say(f"`spresso status {config.run_dir}` shows the progress, `spresso logs {config.run_dir} -f` the log")
    return handed_over


def scripts(config: Config, *, only: str | None = None) -> list[tuple[str, str]]:
    """Return the batch script of each stage that is not done, by stage; nothing is written."""
    root = Path(config.run_dir).resolve()
    jobs = _jobs(config, _stages(config, only), root, next_submission(root))
    return [(job.stages[0], job.text) for job in jobs]


def whole_script(config: Config, *, only: str | None = None) -> str:
    """Return one batch script for all stages, or for `only` one; copy the code and the config that it uses."""
    root = Path(config.run_dir).resolve()
    require_writable(config.name, root)
    require_own_config(root)
    stages = [only] if only else config.stages
    submission = _copy_code_and_config(config, root)
    job = _job(config, stages, root, submission, [])
    job.make_folders()
    write_config(root, config)
    return job.text


def require_idle(root: Path, stages: Sequence[str]) -> None:
    """Raise ValueError if a job of one of these stages is alive."""
    jobs = {item.job: stage for stage, item in submitted(root).items() if stage in stages}
    if living := scheduler.alive(list(jobs)):
        named = ", ".join(f"{job} ({jobs[job]})" for job in living)
        raise ValueError(
            f"{root} has jobs that wait or run: {named}. They continue by themselves; `spresso cancel {root}` ends them"
        )


def describe_request(cluster: ClusterConfig) -> str:
    """Return the resources that a job requests, for people."""
    gpus = f" × {cluster.gpus_per_node} GPU(s)" if cluster.gpus_per_node else f" × {cluster.ranks_per_node} CPU rank(s)"
    where = f" of {cluster.partition}" if cluster.partition else ""
    array = f", {cluster.array} array jobs" if cluster.array > 1 else ""
    return f"{cluster.nodes} node(s){where}{gpus}{array}"


def _stages(config: Config, only: str | None) -> list[str]:
    """Return the stages that are not done, in order."""
    if only is not None:
        return [] if _ended(config, only) else [only]
    if made := shared_latents(config):
        require_own_preparation(config)
    return [
        stage for stage in config.stages if not (made and STAGES[stage].makes_latents) and not _ended(config, stage)
    ]


def _ended(config: Config, stage: str) -> bool:
    if not STAGES[stage].trained:
        return False
    directory = RunDirectory(stage_folder(config, stage), stage)
    directory.require_same(config)
    return directory.done(config)


def _jobs(config: Config, stages: Sequence[str], root: Path, submission: Path) -> list[Job]:
    """Return the jobs as they would be submitted, with `<STAGE>` in place of the ids of earlier jobs."""
    before = [[], *([f"<{stage}>"] for stage in stages)]
    return [_job(config, [stage], root, submission, after) for stage, after in zip(stages, before, strict=False)]


def _job(config: Config, stages: Sequence[str], root: Path, submission: Path, after: Sequence[str]) -> Job:
    cluster = config.cluster.of(stages[0]) if len(stages) == 1 else config.cluster
    return Job(cluster, stages, name=config.name, run=root, submission=submission, after=after)


def _next(root: Path) -> str:
    numbers = [int(path.name) for path in (root / "submissions").glob("[0-9]*") if path.name.isdecimal()]
    return f"{max(numbers, default=0) + 1:04d}"


def _copy_code_and_config(config: Config, root: Path) -> Path:
    """Copy the code and the config that the jobs will use; return their folder."""
    folder = copy_code(root)
    (folder / "config.yaml").write_text(to_yaml(config))
    return folder


def next_submission(root: Path) -> Path:
    """Return the folder of the next submission of a run or a sweep, which is not made."""
    return root / "submissions" / _next(root)


def copy_code(root: Path) -> Path:
    """Copy the code that the jobs of the next submission will use; return the submission's folder."""
    folder = next_submission(root)
    source = RECIPES.parent
    for package in _PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
        shutil.copytree(source / package, folder / "code" / package, ignore=ignored)
    (folder / "code" / COPIED_FROM).write_text(f"{code_version()}\n{local_changes()}")
    return folder
