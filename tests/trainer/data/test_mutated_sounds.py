"""Damaged sounds of every container end in a line or in a sound: no traceback, crash, hang, or more than 1 GiB."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutant_counts import MutantCounts

ROOT = Path(__file__).parents[3]


def read_mutants(first: int, last: int) -> list[str]:
    """The outcomes of mutants, which a process of its own finds."""
    command = [sys.executable, "-m", "tests.trainer.data.sound_mutants", str(first), str(last)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    outcomes = done.stdout.splitlines()
    assert done.returncode == 0, f"mutant {first + len(outcomes)}: {done.stderr[-3000:]}"
    return outcomes


def check(first: int, last: int, counts: MutantCounts) -> None:
    outcomes = read_mutants(first, last)
    assert len(outcomes) == last - first
    assert [text for text in outcomes if "WRONG" in text] == []
    kinds = [text.split()[1] for text in outcomes]
    for kind in kinds:
        counts.begin("sounds")
        counts.end("sounds", refused=kind == "refused:")
    assert kinds.count("read") > len(kinds) / 20
    assert kinds.count("refused:") > len(kinds) / 10


def test_mutated_sounds(mutant_counts):
    check(0, 150, mutant_counts)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(150, 6150, 500))
def test_many_mutated_sounds(first, mutant_counts):
    check(first, first + 500, mutant_counts)
