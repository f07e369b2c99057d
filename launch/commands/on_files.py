"""Commands that look into what lies on a disk: `index`, `data`, `checkpoint`."""

from __future__ import annotations

import argparse

from launch import inspect_files


def index(options: argparse.Namespace) -> None:
    """An index for tars, or a check of one."""
    if options.verify:
        inspect_files.verify(options.folder, workers=options.workers)
    else:
        inspect_files.index(
            options.folder, kind=options.autoencoder, weights=options.autoencoder_folder, workers=options.workers
        )


def data(options: argparse.Namespace) -> None:
    """A set of latents at a glance."""
    if options.samples < 1:
        raise ValueError("--samples is at least 1")
    inspect_files.describe(options.location, samples=options.samples, play_to=options.play_to)


def checkpoint(options: argparse.Namespace) -> int:
    """The checkpoints of a run."""
    return inspect_files.checkpoint(options.folder, verify=options.verify)
