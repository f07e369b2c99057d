"""Commands about runs that are under way, on a cluster or here: `status`, `logs`, `cancel`, `requeue`."""

from __future__ import annotations

import argparse
import sys

from launch.status import logs as log_files
from launch.status import table


def status(options: argparse.Namespace) -> None:
    """How far runs are."""
    print(table.report(table.resolve(options.run) if options.run else None))


def logs(options: argparse.Namespace) -> None:
    """What a run writes."""
    log_files.logs(table.resolve(options.run), stage=options.stage, rank=options.rank, follow=options.follow)


def cancel(options: argparse.Namespace) -> None:
    """End a run's jobs."""
    print(table.cancel(table.resolve(options.run)), file=sys.stderr)


def requeue(options: argparse.Namespace) -> None:
    """Have a run leave its nodes and wait for others."""
    run = table.resolve(options.run)
    told = table.requeue(run)
    if told is not None:
        print(told, file=sys.stderr)
        return
    from launch.slurm import submit  # needs torch, without which the other commands answer
    from trainer.recipes.reading import load_recipe

    submit.run(load_recipe(str(run / "config.yaml"), []))
