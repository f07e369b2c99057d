"""The commands that watch and control runs."""

from __future__ import annotations

from launch.number_option import add_number
from launch.options.common import Commands, add_command, path
from models.ranges import Range

_TRACED = Range(least=1, most=20)  # of `trainer.log.trace_request`, whose import takes as long as all of `--help`
_RUN = "directory of a run, or its name under runs/"


def add_commands(subs: Commands) -> None:
    """Add the commands that watch and control runs, on a cluster or on this machine."""
    _add_status(subs)
    _add_compare(subs)
    _add_dashboard(subs)
    _add_logs(subs)
    _add_profile(subs)
    for name, command, help_ in (
        ("cancel", "on_runs:cancel", "cancel all jobs of a run; training jobs save first"),
        (
            "requeue",
            "on_runs:requeue",
            "make a running job save and return to the queue; if the run has no jobs, submit it again",
        ),
    ):
        add_command(subs, name, command, help_).add_argument("run", metavar="RUN", help=_RUN)


def _add_status(subs: Commands) -> None:
    """Add the command that shows the table of runs."""
    status = add_command(subs, "status", "on_runs:status", "show the state, progress and expected end of runs")
    status.add_argument(
        "run",
        nargs="?",
        metavar="RUN",
        help=f"{_RUN}; also shows each start of its jobs (default: an overview of all runs under runs/)",
    )
    add_number(
        status,
        "--watch",
        Range(least=1, most=86_400),
        "redraw the table after so many seconds, until Ctrl-C; into a file or a pipe, print it at each change",
        kind=float,
        without="show it once; 5 s if no number is given",
        bare=5.0,
    )


def _add_compare(subs: Commands) -> None:
    """Add the command that compares runs."""
    compare = add_command(
        subs, "compare", "on_runs:compare", "compare runs: settings, figures, curves and sounds, as a table and a page"
    )
    compare.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help=f"{_RUN}; a sweep stands for all its points; the first run is the one to compare with",
    )
    compare.add_argument(
        "--out",
        type=path,
        default="comparison",
        metavar="FOLDER",
        help="folder to write the page to (default: %(default)s)",
    )


def _add_dashboard(subs: Commands) -> None:
    """Add the command that serves a page over all runs."""
    dashboard = add_command(
        subs,
        "dashboard",
        "on_runs:dashboard",
        "serve a web page that follows all runs, to this machine only, until Ctrl-C",
    )
    dashboard.add_argument(
        "folder", nargs="?", metavar="FOLDER", type=path, help="folder of runs (default: runs)", default=path("runs")
    )
    add_number(dashboard, "--port", Range(least=0, most=65_535), "port", without="8017, or a free one if it is taken")


def _add_logs(subs: Commands) -> None:
    """Add the command that shows a log."""
    logs = add_command(subs, "logs", "on_runs:logs", "show the log of a run")
    logs.add_argument("run", metavar="RUN", help=_RUN)
    logs.add_argument("--stage", help="stage whose log to show (default: the one that is running or ran last)")
    add_number(logs, "--rank", Range(least=0), "rank whose log to show", without="0")
    logs.add_argument("-f", "--follow", action="store_true", help="keep printing new lines until Ctrl-C")


def _add_profile(subs: Commands) -> None:
    """Add the command that traces steps."""
    profile = add_command(
        subs,
        "profile",
        "on_runs:profile",
        "trace some steps of a running training, which continues, and show the costliest kernels; "
        "log.profile_steps=N does so for a new run",
    )
    profile.add_argument("run", metavar="RUN", help=_RUN)
    add_number(profile, "--steps", _TRACED, "number of steps to trace", default=5)
