"""Submits a sweep to SLURM: each shared stage as a job, and the points as one array that waits for them."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch import owner
from launch.pipeline import say
from launch.slurm import preflight, scheduler, submit, submitted_jobs
from launch.slurm.job_script import Job, require_writable
from launch.slurm.submitted_jobs import Submitted
from launch.sweep import directory, shown
from launch.sweep.plan import Plan, SharedStage, SweepPoint, recorded_plan
from launch.sweep.points_job import Element, PointsJob
from trainer.file_names import printable_lines
from trainer.recipes.values import to_yaml
from trainer.stage_inputs import stage_inputs
from trainer.stages import STAGES

Key = tuple[str, str]
"""What names a shared stage: its run directory below the sweep's, and the stage."""


def run(plan: Plan, *, dry: bool = False) -> int:
    """Submit what is neither done nor alive, or show it; return the exit status.

    Raises:
        ValueError: a check failed, or SLURM refuses a job; no job is left in the queue.
    """
    root = plan.folder.resolve()
    require_writable(plan.name, root)
    directory.require_free(root)
    if dry:
        _show(plan, root)
        return 0
    with owner.holding(root):  # two submissions at one moment would both find the points idle
        _submit(plan, root)
    return 0


def submit_again(folder: Path) -> None:
    """Submit what is neither done nor alive of a sweep, as its directory has it.

    Raises:
        ValueError: it does not run on SLURM, a check failed, or SLURM refuses a job.
    """
    plan = recorded_plan(folder)
    if plan.points[0].config.cluster.kind != "slurm":
        raise ValueError(f"{folder} runs without SLURM: repeat `spresso sweep {plan.recipe} … --dir {folder}`")
    run(plan)


def _show(plan: Plan, root: Path) -> None:
    for line in shown.lines(plan):
        print(printable_lines(line))
    try:
        points, shared, living = _to_submit(plan, root)
    except scheduler.QueueError:  # a machine without SLURM can show what would be submitted as well
        points = [point for point in plan.points if not directory.is_done(point)]
        shared, living = _not_done(plan.needed_by(points)), dict[Key, str]()
    named = {key: f"<{key[1]} of {key[0]}>" for key in (each.key for each in shared)} | dict(living)
    submission = submit.next_submission(root)
    for each in shared:
        print(f"\n# ---- {each.stage} in {each.folder}\n{_shared_job(each, root, submission, named).text}")
    if points:
        print(f"\n# ---- points\n{_points_job(plan, points, root, submission, named).text}")


def _submit(plan: Plan, root: Path) -> None:
    points, shared, jobs = _to_submit(plan, root)
    if not points:
        say("all points are done" if not _living_points(plan, root) else "all points are done, or wait or run")
        return
    directory.make(plan)
    submission = submit.copy_code(root)
    _write_configs(submission, [*shared, *points])
    _check(plan, points, shared, root, submission, jobs)
    handed_over: list[str] = []
    kept: list[tuple[Path, list[Submitted]]] = []
    try:
        for each in shared:
            job = _shared_job(each, root, submission, jobs)
            jobs = {**jobs, each.key: job.hand_over()}
            handed_over.append(jobs[each.key])
            kept.append((job.run, [_submitted(each.stage, jobs[each.key], job)]))
            request = submit.describe_request(job.cluster)
            say(f"  {each.stage} for {len(each.points)} points: job {handed_over[-1]}, {request}")
        array = _points_job(plan, points, root, submission, jobs)
        number = array.hand_over()
        handed_over.append(number)
        for place, element in enumerate(array.elements):
            kept.append((element.run, [_of_point(stage, number, place, element, array) for stage in element.stages]))
        for run_directory, items in kept:
            submitted_jobs.keep(run_directory, items)
    except BaseException:  # also a full disk or Ctrl-C
        if handed_over:
            scheduler.cancel(*handed_over)
        raise
    bound = f", {plan.at_once} at once" if plan.at_once else ""
    say(f"  {len(points)} points: array {number}{bound}, {submit.describe_request(array.cluster)} each")
    say(f"`spresso status {plan.folder}` shows the progress")


def _to_submit(plan: Plan, root: Path) -> tuple[list[SweepPoint], list[SharedStage], Mapping[Key, str]]:
    """Return the points and shared stages to submit, and the jobs of the shared stages that are alive."""
    busy = _living_points(plan, root)
    points = [point for point in plan.points if point.name not in busy and not directory.is_done(point)]
    needed = _not_done(plan.needed_by(points))
    known = {each.key: submitted_jobs.submitted(root / each.folder).get(each.stage) for each in needed}
    alive = set(scheduler.alive([item.job for item in known.values() if item is not None]))
    living = {key: item.job for key, item in known.items() if item is not None and item.job in alive}
    return points, [each for each in needed if each.key not in living], living


def _not_done(shared: Sequence[SharedStage]) -> list[SharedStage]:
    return [each for each in shared if not directory.is_done(each)]


def _living_points(plan: Plan, root: Path) -> set[str]:
    """Return the names of the points of which a job waits or runs."""
    jobs: dict[str, str] = {}
    for point in plan.points:
        known = submitted_jobs.submitted(root / directory.folder_of(point))
        jobs |= {item.job: point.name for stage, item in known.items() if stage in point.own}
    return {jobs[job] for job in scheduler.alive(list(jobs))}


def _shared_job(shared: SharedStage, root: Path, submission: Path, jobs: Mapping[Key, str]) -> Job:
    after = list(dict.fromkeys(jobs[key] for key in shared.after if key in jobs))
    cluster, run_directory = shared.config.cluster.of(shared.stage), root / shared.folder
    own = submission / shared.folder
    return Job(cluster, [shared.stage], name=shared.config.name, run=run_directory, submission=own, after=after)


def _points_job(
    plan: Plan, points: Sequence[SweepPoint], root: Path, submission: Path, jobs: Mapping[Key, str]
) -> PointsJob:
    elements = [
        Element(root / directory.folder_of(point), submission / directory.folder_of(point), point.own)
        for point in points
    ]
    after = list(dict.fromkeys(jobs[each.key] for each in plan.needed_by(points) if each.key in jobs))
    cluster = points[0].config.cluster
    return PointsJob(
        cluster, elements, name=plan.name, sweep=root, submission=submission, after=after, at_once=plan.at_once
    )


def _check(
    plan: Plan,
    points: Sequence[SweepPoint],
    shared: Sequence[SharedStage],
    root: Path,
    submission: Path,
    jobs: Mapping[Key, str],
) -> None:
    """Check the submission as `preflight.check` does. Raises ValueError with a line for every problem."""
    named = {each.key: "1" for each in shared} | dict(jobs)
    tried = [_shared_job(each, root, submission, named) for each in shared]
    tried.append(_points_job(plan, points, root, submission, named))
    runs = [(each.config, [each.stage]) for each in shared] + [(point.config, point.own) for point in points]
    first = runs[0]
    ready = not jobs and not any(key in named for key in (shared[0].after if shared else ()))
    inputs = list[str]()
    if ready and STAGES[first[1][0]].trained:
        try:
            stage_inputs(first[0], first[1][0])
        except (ValueError, OSError) as error:
            inputs.append(str(error))
    preflight.check_all(runs, submission, tried, inputs=inputs)


def _write_configs(submission: Path, parts: Sequence[SweepPoint | SharedStage]) -> None:
    """Write the config of each part beside a link to the code, which all of them share."""
    for part in parts:
        folder = submission / directory.folder_of(part)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(to_yaml(part.config))
        if not (folder / "code").is_symlink():
            (folder / "code").symlink_to(os.path.relpath(submission / "code", folder), target_is_directory=True)


def _submitted(stage: str, number: str, job: Job) -> Submitted:
    return Submitted(stage, number, str(job.submission), str(job.log), time.time())


def _of_point(stage: str, number: str, place: int, element: Element, array: PointsJob) -> Submitted:
    """Return a stage of a point as submitted: one element of the array."""
    log = str(array.log).replace("%A", number).replace("%a", str(place))
    return Submitted(stage, f"{number}_{place}", str(element.submission), log, time.time())
