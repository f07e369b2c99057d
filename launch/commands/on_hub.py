"""Commands for public weights and the Hugging Face hub: `weights`, `push`."""

from __future__ import annotations

import argparse

from launch import list_weights
from trainer.file_names import printable_lines


def weights(options: argparse.Namespace) -> int:
    """List the public weights, or check a folder of them; return 1 if something of it is missing or damaged."""
    if options.folder is None:
        print(list_weights.listing())
        return 0
    from models.check_weights import check_weights  # needs torch, which the list does without

    checked = check_weights(options.folder)
    print(list_weights.report(checked))
    return 0 if checked.whole else 1


def push(options: argparse.Namespace) -> None:
    """Upload a codec's export and its model card to the hub."""
    from launch.push import push as push_export  # needs torch, which the list does without

    done = push_export(
        options.codec,
        options.name,
        evaluation=options.evaluation,
        sounds=options.sounds,
        licence=options.license,
        private=options.private,
        revision=options.revision,
        dry=options.dry_run,
    )
    print(printable_lines(done))
