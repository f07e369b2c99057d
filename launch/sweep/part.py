"""Runs the stages of one part of a sweep in a process of its own: `python -m launch.sweep.part SWEEP PART STAGE…`.

A part is a point or a shared stage. In a process of its own, whatever becomes of it, even a kill for lack of memory,
leaves the others alone.
"""

from __future__ import annotations

import ctypes
import signal
import sys
import traceback
from contextlib import suppress
from pathlib import Path

from launch.cli import end
from launch.output import survive_readers
from launch.signals import INTERRUPTED, MISTAKE, STOPPED
from launch.sweep import outcomes
from trainer.file_names import printable_lines

_PR_SET_PDEATHSIG = 1  # of Linux's prctl


def main() -> int:
    """Run the part, and add its outcome to the sweep's; return the exit status."""
    sweep, part, *stages = sys.argv[1:]
    _end_with_parent()
    why, status = "", 1
    try:
        outcome = _run(Path(sweep) / part, stages)
        status = STOPPED if outcome == "stopped" else 0
    except KeyboardInterrupt:
        status = INTERRUPTED
    except SystemExit as error:  # a rank has failed, and has said why
        why, status = f"a rank ended with status {error.code}", error.code if isinstance(error.code, int) else 1
    except (ValueError, OSError) as error:
        from launch.error_line import describe_error

        why, status = printable_lines(describe_error(error)), MISTAKE
        print(f"spresso: {why}", file=sys.stderr)
    except Exception as error:
        why = printable_lines(f"{type(error).__name__}: {error}")
        print(printable_lines(traceback.format_exc()), end="", file=sys.stderr)
    ended = {0: outcomes.DONE, STOPPED: outcomes.STOPPED, INTERRUPTED: outcomes.STOPPED}.get(status, outcomes.FAILED)
    outcomes.append(Path(sweep), part, ended, why)
    return status


def _run(folder: Path, stages: list[str]) -> str:
    from launch import pipeline  # needs torch, during whose import the process is to end with its parent
    from trainer.recipes.reading import load_recipe

    return pipeline.run(load_recipe(str(folder / "config.yaml"), []), stages)


def _end_with_parent() -> None:
    """Have the system ask this process to save and end if its parent is killed, so that the next finds nobody here."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    survive_readers()
    end(main())
