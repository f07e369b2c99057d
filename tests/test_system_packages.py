"""Tests skip, or with CI set fail, for want of a Debian package, and the packages are named at the end."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.system_packages import BROWSER, COMPILER, KNOWN_BY, SLURM, SOUNDS, missing, summary

ROOT = Path(__file__).parents[1]
NEEDS_TWO = """
from tests import system_packages

system_packages.KNOWN_BY |= {"spam": ("/nowhere",), "eggs": ("no-such-program",), "sh": ("sh",)}

def test_one():
    system_packages.require("spam", "sh", "eggs")

def test_other():
    system_packages.require("sh")
"""


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, Path | str]:
    """A machine without any of the packages."""
    (tmp_path / "bin").mkdir()
    return {"root": tmp_path / "root", "path": str(tmp_path / "bin")}


def install(mark: str, root: Path, path: str) -> None:
    """Put a program, or a file below the root, in its place."""
    file = root / mark[1:] if mark.startswith("/") else Path(path) / mark
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch(0o755)


def test_all_are_missing_on_a_bare_machine(bare):
    assert missing(KNOWN_BY, **bare) == sorted(KNOWN_BY)


@pytest.mark.parametrize("package", KNOWN_BY)
def test_a_package_is_there_with_all_that_it_is_known_by(bare, package):
    for mark in KNOWN_BY[package]:
        assert missing([package], **bare) == [package]
        install(mark, **bare)
    assert missing([package], **bare) == []
    assert missing(KNOWN_BY, **bare) == sorted(set(KNOWN_BY) - {package})


def test_ci_installs_every_one():
    lists = re.findall(r'^packages="(?:\$packages )?(.*)"$', (ROOT / ".ci/run").read_text(), re.MULTILINE)
    assert sorted(" ".join(lists).split()) == sorted(KNOWN_BY)
    assert set(KNOWN_BY) == {"nginx-light", "libnginx-mod-http-dav-ext", *SOUNDS, *BROWSER, *SLURM, *COMPILER}


def run_tests(folder: Path, *options: str, ci: bool = False) -> subprocess.CompletedProcess[str]:
    """pytest, with the hooks of tests.system_packages, on a test that lacks two packages and one that lacks none."""
    (folder / "test_two.py").write_text(NEEDS_TWO)
    command = [sys.executable, "-m", "pytest", "-p", "tests.system_packages", "-c", str(ROOT / "setup.cfg")]
    environment = {name: value for name, value in os.environ.items() if name != "CI"} | ({"CI": "1"} if ci else {})
    environment["PYTHONPATH"] = str(ROOT)
    command += [f"--rootdir={folder}", *options, "test_two.py"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_what_is_skipped_is_listed_with_the_command_to_install_it(tmp_path):
    done = run_tests(tmp_path)
    assert done.returncode == 0
    assert "1 passed, 1 skipped" in done.stdout
    assert "eggs spam: 1 in test_two.py" in done.stdout
    assert "sudo apt-get install --no-install-recommends eggs spam\n" in done.stdout


def test_several_runs_are_listed_together(tmp_path):
    for options in ([], ["-n1"]):
        done = run_tests(tmp_path, f"--note-skips={tmp_path / 'skips'}", *options)
        assert "1 passed, 1 skipped" in done.stdout
        assert "apt-get" not in done.stdout
    command = [sys.executable, "-m", "tests.system_packages", str(tmp_path / "skips")]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "eggs spam: 2 in test_two.py\n" in listed
    assert listed.count("apt-get") == 1


def test_with_ci_set_a_missing_package_is_a_failure_that_names_it(tmp_path):
    done = run_tests(tmp_path, ci=True)
    assert done.returncode == 1
    assert "1 failed, 1 passed" in done.stdout
    assert "missing Debian packages: eggs spam" in done.stdout


def test_where_nothing_was_skipped_nothing_is_listed(tmp_path):
    assert summary([]) == []
    command = [sys.executable, "-m", "tests.system_packages", str(tmp_path / "none")]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout == ""


def make_test(folder: Path, *statuses: int) -> subprocess.CompletedProcess[str]:
    """`make test` in an environment whose pytest only says that it runs, and ends with one status after the other."""
    (folder / "bin").mkdir()
    for name, status in enumerate(statuses):
        (folder / f"status{name}").write_text(str(status))
    (folder / "bin/python").write_text(
        f"#!/bin/sh\ncase $2 in pytest) echo runs;; *) echo lists; exit 0;; esac\n"
        f"for file in {folder}/status*; do status=$(cat $file); rm $file; exit $status; done\n"
    )
    (folder / "bin/python").chmod(0o755)
    for stamp in (".installed", ".aisfx", ".visqol"):
        (folder / stamp).touch()
    command = ["make", "test", f"VENV={folder}"]
    # These tests may run below a make themselves, whose variables would make this one announce its folders.
    environment = {
        name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")
    }
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("statuses", "expected"), [((0, 0), 0), ((1, 0), 1), ((0, 3), 3), ((1, 5), 5)])
def test_make_test_runs_both_halves_and_ends_with_the_failure(tmp_path, statuses, expected):
    done = make_test(tmp_path, *statuses)
    assert done.stdout.split()[:3] == ["runs", "runs", "lists"]
    assert done.returncode == (2 if expected else 0)
    assert f"Error {expected}" in done.stderr or not expected
