"""Commands that watch, compare and control runs, on a cluster or here: `status`, `dashboard`, `compare`, `logs` …"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from launch.status import logs as log_files
from launch.status import table, traces, watch
from launch.sweep import record as records
from trainer.file_names import printable_lines
from trainer.stages import trained_stages


def status(options: argparse.Namespace) -> None:
    """Print the state and progress of runs, once or again and again."""
    run = table.resolve(options.run) if options.run else None
    if options.watch is not None:
        watch.watch(run, seconds=options.watch)
        return
    print(printable_lines(table.report(run)))


def dashboard(options: argparse.Namespace) -> None:
    """Serve a page that follows all runs."""
    from launch.dashboard.server import serve  # it needs numpy, whose import takes longer than `spresso status`

    serve(options.folder, port=options.port)


def compare(options: argparse.Namespace) -> None:
    """Print how runs differ, and write the page that compares them."""
    # These imports need torch, which the other commands of this module do without.
    from launch import owner
    from trainer.compare import comparison, page, tables

    folders = [folder for run in options.runs for folder in _points_or_run(table.resolve(run))]
    compared = comparison.compare(folders)
    print(printable_lines(tables.text(compared)))
    with owner.holding(options.out):
        index = page.write_comparison(compared, options.out)
    print(f"open {index.resolve()}", file=sys.stderr)


def logs(options: argparse.Namespace) -> None:
    """Print the log of a run."""
    log_files.logs(table.resolve(options.run), stage=options.stage, rank=options.rank, follow=options.follow)


def profile(options: argparse.Namespace) -> None:
    """Trace some steps of a running training."""
    print(printable_lines(traces.profile(table.resolve(options.run), steps=options.steps)))


def cancel(options: argparse.Namespace) -> None:
    """Cancel the jobs of a run."""
    print(printable_lines(table.cancel(table.resolve(options.run))), file=sys.stderr)


def requeue(options: argparse.Namespace) -> None:
    """Requeue the running jobs of a run, or submit the run again if it has none."""
    run = table.resolve(options.run)
    message = table.requeue(run)
    if message is not None:
        print(printable_lines(message), file=sys.stderr)
        return
    # These imports need torch, which the other commands of this module do without.
    from launch.slurm import submit
    from trainer.recipes.reading import load_recipe

    if table.sweeps.is_sweep(run):
        from launch.sweep import jobs

        jobs.submit_again(run)
        return
    submit.run(load_recipe(str(run / "config.yaml"), []))


def _points_or_run(folder: Path) -> list[Path]:
    """Return the run directories of a sweep's points that have begun, or the directory itself if it is no sweep's."""
    sweep = records.read(folder)
    points = [folder / point.folder for point in sweep.points] if sweep else [folder]
    return [point for point in points if not sweep or any((point / stage).exists() for stage in trained_stages())]
