"""Shows a sweep before it begins: the points, what differs, what they share, and what exists already."""

from __future__ import annotations

from collections.abc import Iterator

from launch.sweep import directory
from launch.sweep.plan import Plan, SharedStage, SweepPoint
from trainer.checkpoints.names import checkpoints
from trainer.formatting import aligned
from trainer.recipes.values import flatten
from trainer.run_directory import RunDirectory, stage_folder
from trainer.stages import STAGES


def lines(plan: Plan) -> Iterator[str]:
    """Yield the lines of `--dry-run`. Nothing is written."""
    yield f"{len(plan.points)} point(s) in {plan.folder}"
    rows = [("point", *plan.keys, "shares", "runs", "state")]
    rows += [
        (
            point.name,
            *(_value(point, key) for key in plan.keys),
            " ".join(point.elsewhere),
            " ".join(point.own),
            state(point),
        )
        for point in plan.points
    ]
    yield aligned(rows)
    if plan.shared:
        yield ""
        rows = [("shared stage", "stage", "by", "state")]
        rows += [(shared.folder, shared.stage, f"{len(shared.points)} points", state(shared)) for shared in plan.shared]
        yield aligned(rows)
    yield from remarks(plan)


def remarks(plan: Plan) -> Iterator[str]:
    """Yield what a user should know of the points that a command names, and of those that it does not."""
    if plan.repeated:
        yield f"{plan.repeated} point(s) have the settings of another one, and count once"
    if plan.others:
        yield f"{len(plan.others)} point(s) of earlier commands are not named now, and stay as they are"


def state(part: SweepPoint | SharedStage) -> str:
    """Return what exists of a point or a shared stage, in one or two words."""
    if directory.is_done(part):
        return "done"
    for stage in reversed([stage for stage in directory.stages_to_run(part) if STAGES[stage].trained]):
        folder = RunDirectory(stage_folder(part.config, stage), stage)
        if folder.done(part.config):
            return f"{stage} done"
        if there := checkpoints(folder.checkpoints):
            return f"{stage} at {there[-1].name}"
    return "new"


def _value(point: SweepPoint, key: str) -> str:
    """Return the value of a key that differs within the sweep, for a point of an earlier command too."""
    return point.settings.get(key, str(flatten(point.config).get(key, "")))
