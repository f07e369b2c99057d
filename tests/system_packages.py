"""Debian packages that tests need: how each is recognised, and what was skipped for want of one.

A test calls `require` with what it needs. At its end `make test` lists the tests that were skipped, and the one command
that installs all that they need.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
"""Debian keeps daemons, and ip, where not every user's PATH leads."""
SOUNDS = ("alsa-utils", "minetest-data", "sonic-pi-samples", "sound-theme-freedesktop", "ufoai-sound")
BROWSER = ("chromium", "chromium-driver")
SLURM = ("iproute2", "munge", "slurm-wlm")
COMPILER = ("g++", "python3-dev")
KNOWN_BY = {
    "alsa-utils": ("/usr/share/sounds/alsa",),
    "chromium": ("chromium",),
    "chromium-driver": ("chromedriver",),
    "g++": ("g++",),
    "iproute2": ("ip",),
    "libnginx-mod-http-dav-ext": ("/usr/lib/nginx/modules/ngx_http_dav_ext_module.so",),
    "minetest-data": ("/usr/share/games/minetest/games",),
    "munge": ("munged",),
    "nginx-light": ("nginx",),
    "python3-dev": (f"{sysconfig.get_config_var('INCLUDEPY')}/Python.h",),
    "slurm-wlm": ("sbatch", "slurmctld", "slurmd"),
    "sonic-pi-samples": ("/usr/share/sonic-pi/samples",),
    "sound-theme-freedesktop": ("/usr/share/sounds/freedesktop",),
    "ufoai-sound": ("/usr/share/games/ufoai/base/0snd.pk3",),
}
"""Package → programs, or absolute paths, all of which are there where the package is installed."""
_MISSING = "missing Debian packages: "


def require(*packages: str) -> None:
    """Skip the test that calls this, unless all of these packages are installed; with CI set the test fails instead."""
    if absent := missing(packages):
        reason = _MISSING + " ".join(absent)
        if os.environ.get("CI"):
            pytest.fail(f"{reason}; with CI set nothing is skipped for want of them", pytrace=False)
        pytest.skip(reason)


def missing(packages: Iterable[str], *, path: str = PATH, root: Path = Path("/")) -> list[str]:
    """Those of the packages that are not installed, sorted.

    Args:
        packages: of `KNOWN_BY`.
        path: where programs are looked for, as in $PATH.
        root: what absolute paths begin at.
    """

    def is_there(mark: str) -> bool:
        return (root / mark[1:]).exists() if mark.startswith("/") else shutil.which(mark, path=path) is not None

    return sorted(package for package in packages if not all(map(is_there, KNOWN_BY[package])))


def pytest_addoption(parser: pytest.Parser) -> None:
    """`make test` runs pytest twice, and lists at its end what either has skipped."""
    parser.addoption("--note-skips", type=Path, help="note in this file, and don't list, tests that lack a package")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """List, or note, the tests that were skipped for want of a package."""
    if hasattr(config, "workerinput"):  # a worker of pytest-xdist: its reports are the main process's, too
        return
    skipped = list(_skipped(terminalreporter.stats.get("skipped", [])))
    if notes := config.getoption("note_skips"):
        with notes.open("a") as file:
            file.writelines("\t".join(skip) + "\n" for skip in skipped)
    else:
        terminalreporter.write("".join(f"{line}\n" for line in summary(skipped)))


def _skipped(reports: Iterable[pytest.TestReport]) -> Iterator[tuple[str, str]]:
    """A test's file and its missing packages, separated by spaces, where that is why it was skipped."""
    for report in reports:
        _, _, reason = report.longrepr
        if packages := reason.partition(_MISSING)[2]:
            yield report.nodeid.partition("::")[0], packages


def summary(skipped: Iterable[tuple[str, str]]) -> list[str]:
    """Lines that name the tests that were skipped for each set of packages, and one command that installs all of those.

    Args:
        skipped: a test's file, and its missing packages, separated by spaces.
    """
    tests: dict[str, list[str]] = defaultdict(list)
    for file, packages in skipped:
        tests[packages].append(file)
    if not tests:
        return []
    lines = [f"  {packages}: {len(files)} in {', '.join(sorted(set(files)))}" for packages, files in tests.items()]
    every = sorted({package for packages in tests for package in packages.split()})
    command = f"sudo apt-get install --no-install-recommends {' '.join(every)}"
    return ["Tests skipped for want of Debian packages:", *sorted(lines), "This installs all of them:", f"  {command}"]


if __name__ == "__main__":  # python -m tests.system_packages FILE: what runs of pytest with --note-skips=FILE noted
    notes = Path(sys.argv[1])
    noted = notes.read_text().splitlines() if notes.exists() else []
    sys.stdout.writelines(f"{line}\n" for line in summary(note.split("\t") for note in noted))
