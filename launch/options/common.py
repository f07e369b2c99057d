"""What the commands of several modules share: how a command is added, and the options that many commands have."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from launch.number_option import add_number
from models.ranges import Range
from trainer.cpus import usable_cpus

Commands = argparse._SubParsersAction  # what `add_subparsers` returns; the commands are added to it

SEED = Range(least=0)
_WORKERS = Range(least=1, most=4096)


def add_command(
    subs: Commands,
    name: str,
    command: str,
    help_: str,
) -> argparse.ArgumentParser:
    """Add a command, whose function is `command` (`module:function`) in `launch.commands`."""
    sub = subs.add_parser(name, help=help_, description=help_[0].upper() + help_[1:] + ".", allow_abbrev=False)
    sub.set_defaults(command=command)
    return sub


def add_workers(sub: argparse.ArgumentParser) -> None:
    """Add the option that sets the number of processes."""
    without = "the number of CPUs that may be used, %(default)s"
    add_number(sub, "--workers", _WORKERS, "number of processes", default=usable_cpus(), without=without)


def path(text: str) -> Path:
    """Return a path with `~` expanded, which the shell leaves as it is after a `=`."""
    return Path(os.path.expanduser(text))  # noqa: PTH111 (pathlib raises RuntimeError for an unknown home)
