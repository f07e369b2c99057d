"""Commands that inspect files: `index`, `data`, `checkpoint`."""

from __future__ import annotations

import argparse
from pathlib import Path

from launch import inspect_files


def index(options: argparse.Namespace) -> None:
    """Build the index of tar files, or verify the files with it."""
    if options.verify:
        inspect_files.verify(options.folder, workers=options.workers)
    else:
        inspect_files.index(
            options.folder, kind=options.autoencoder, weights=options.autoencoder_folder, workers=options.workers
        )


def data(options: argparse.Namespace) -> None:
    """Summarize a set of latents."""
    inspect_files.describe(options.location, samples=options.samples, play_to=options.play_to)


def checkpoint(options: argparse.Namespace) -> int:
    """List, describe or verify checkpoints; return the exit status."""
    named = Path("runs") / options.folder
    folder = named if named.is_dir() and not options.folder.exists() else options.folder
    return inspect_files.checkpoint(folder, verify=options.verify)
