"""The command `sweep`."""

from __future__ import annotations

import argparse

from launch.launcher_variables import require_no_launcher
from launch.sweep import here, shown
from launch.sweep.plan import make_plan
from trainer.file_names import printable_lines


def sweep(options: argparse.Namespace) -> int:
    """Run the points of a sweep, or submit them; return the exit status."""
    plan = make_plan(
        options.recipe, options.overrides, points=options.points, folder=options.dir, at_once=options.at_once
    )
    on_slurm = plan.points[0].config.cluster.kind == "slurm"
    if options.at_once is not None and not on_slurm:
        raise ValueError("--at-once bounds the jobs of cluster=slurm; here, points run one after another: leave it out")
    if not options.dry_run:
        for line in shown.remarks(plan):
            here.say(line)
    if on_slurm:
        from launch.sweep import jobs

        return jobs.run(plan, dry=options.dry_run)
    if options.dry_run:
        for line in shown.lines(plan):
            print(printable_lines(line))
        return 0
    require_no_launcher()
    return here.run(plan)
