"""The program `spresso`: its commands and their options.

The functions behind the commands are in `launch.commands`. They are imported only when a command is called, so that
`--help` is fast.
"""

from __future__ import annotations

import argparse
import atexit
import importlib
import os
import sys
import textwrap
from typing import Any, NoReturn

from launch.options import files, hub, recipes, runs, sounds
from launch.output import survive_readers
from launch.signals import INTERRUPTED
from trainer.cpus import let_threads_sleep


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit status: 2 for a user's mistake, which is reported in one line."""
    options = _parse(arguments)
    try:
        module, _, function = options.command.partition(":")
        command = getattr(importlib.import_module(f"launch.commands.{module}"), function)
        return command(options) or 0
    except KeyboardInterrupt:
        print("spresso: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError) as error:
        if "SPRESSO_DEBUG" in os.environ:
            raise
        from launch.error_line import describe_error  # imported here, so that `--help` is fast

        print(textwrap.indent(describe_error(error), "spresso: "), file=sys.stderr)
        return 2


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse a command line; settings of a recipe may also follow an option, where argparse alone does not take them."""
    top = parser()
    options, rest = top.parse_known_args(arguments)
    if unknown := [word for word in rest if word.startswith("-") or "=" not in word or "overrides" not in options]:
        top.error(f"unrecognized arguments: {' '.join(unknown)}{_mend_of(unknown, options)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _mend_of(unknown: list[str], options: argparse.Namespace) -> str:
    """Return what mends arguments that no command knows; empty if the usage has to do."""
    settings = [word.lstrip("-") for word in unknown if word.startswith("--") and "=" in word]
    if "overrides" in options and settings:
        return f": settings of a recipe are written without dashes, such as {settings[0]}"
    return ""


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands and their options."""
    top = argparse.ArgumentParser(
        prog="spresso",
        description="Train S-PRESSO-type audio codecs and use them.",
        epilog="Begin with `spresso run tiny`, which tests the installation; `spresso COMMAND --help` explains more.",
        allow_abbrev=False,
    )
    top.add_argument("--version", action=_Version, help="print the version of the program and of its code, and exit")
    subs = top.add_subparsers(metavar="COMMAND", required=True)

    sounds.add_synth(subs)
    recipes.add_commands(subs)
    runs.add_commands(subs)
    files.add_commands(subs)
    sounds.add_codec_commands(subs)
    hub.add_commands(subs)
    return top


class _Version(argparse.Action):
    """Prints the version. It is an action so that git runs only for `--version`, not at every start."""

    def __init__(self, option_strings: list[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **options)

    def __call__(self, parser: argparse.ArgumentParser, *unused: Any) -> None:
        """Print the version and exit."""
        from importlib import metadata  # imported here: these two imports take as long as all of `--help`

        from trainer.provenance import code_version

        python = sys.version.partition(" ")[0]
        print(f"spresso {metadata.version('spresso')}, code {code_version()[:12]}, Python {python}")
        parser.exit()


def command() -> None:
    """Run `main` and end the process."""
    survive_readers()
    let_threads_sleep()
    end(main())


def end(status: int) -> NoReturn:
    """End the process with an exit status.

    If torch was imported, the process runs its exit handlers and then ends without the interpreter's own shutdown:
    threads of torch do not always survive that shutdown and would abort a command that has succeeded.
    """
    if "torch" in sys.modules:
        if not _hangs():
            atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _hangs() -> bool:
    """Whether a tracker was left behind that hangs: the exit handlers of its package would wait for it."""
    background = sys.modules.get("trainer.log.trackers.background")
    return background is not None and background.any_abandoned()


if __name__ == "__main__":
    command()
