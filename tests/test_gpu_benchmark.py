"""The benchmark for a GPU, run on a CPU with tiny sizes: its rows, its time limit, and cases that go wrong."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"


def run(folder: Path, *arguments: str) -> tuple[list[dict[str, Any]], str, str]:
    """Run the benchmark; return its rows, its tables, and what it printed."""
    out = folder / "gpu.jsonl"
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--device", "cpu", "--small", "--out", str(out), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in out.read_text().splitlines()], (folder / "gpu.md").read_text(), done.stdout


def test_each_row_is_printed_and_in_both_files(tmp_path):
    rows, tables, printed = run(tmp_path, "--sections", "card", "keyed numbers")
    assert [row["case"] for row in rows if row["section"] == "keyed numbers"][:2] == ["uniform", "normal, plain"]
    assert all(row["differing"] == 0 for row in rows if row["section"] == "keyed numbers" and "differing" in row)
    assert len(printed.splitlines()) == len(rows)
    for row in rows:
        assert f"{row['section']}: {row['case']}: " in printed
        assert f"\n| {row['case']} | " in tables
    assert {row["section"] for row in rows} == {"card", "keyed numbers", "data"}


def test_what_there_is_no_time_for_is_named(tmp_path):
    rows, tables, _ = run(tmp_path, "--minutes", "0")
    assert len({row["section"] for row in rows}) == 10
    assert all(row.keys() == {"section", "case", "not run"} for row in rows)
    assert tables.count("not run: the time is used up") == len(rows)


def test_a_file_that_is_there_is_kept(tmp_path):
    out = tmp_path / "gpu.jsonl"
    out.write_text("kept")
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--device", "cpu", "--small", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"{out} exists" in done.stderr
    assert out.read_text() == "kept"


@pytest.fixture
def sections(monkeypatch, tmp_path):
    """Returns a function that runs a section whose cases are written in a text; it returns the section's rows."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.syspath_prepend(str(tmp_path))
    import gpu_cases
    import gpu_report

    def run_cases(text: str, *, seconds: float, method: str = "fork") -> list[dict[str, Any]]:
        header = "import os, time\nfrom gpu_cases import NotAvailable\n\n"
        (tmp_path / "toy_cases.py").write_text(header + textwrap.dedent(text))
        sys.modules.pop("toy_cases", None)
        report = gpu_report.Report(tmp_path / "rows.jsonl")
        setting = gpu_cases.Setting(tmp_path, tmp_path / "logs", "cpu", small=True)
        section = gpu_cases.Section("toys", "toy_cases", share=1.0)
        deadline = time.monotonic() + seconds
        gpu_cases.run_section(section, setting, report, deadline=deadline, method=method)
        return report.rows("toys")

    return run_cases


FAILING = """
    def raises(row):
        row("half", ms=1.23456)
        print("said before")
        raise RuntimeError("CUDA error: an illegal access\\nmore of it")

    def refused(row):
        raise NotAvailable("unknown key parallel.graph")

    def crashes(row):
        os.kill(os.getpid(), 9)

    def works(row):
        row("whole", ms=2)

    def cases(setting):
        return {"raises": raises, "refused": refused, "crashes": crashes, "works": works}
    """


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_case_that_fails_takes_nothing_from_the_next(sections, method, tmp_path):
    half, raised, refused, crashed, works = sections(FAILING, seconds=60, method=method)
    assert half == {"section": "toys", "case": "half", "ms": 1.235}
    assert raised == {"section": "toys", "case": "raises", "error": "RuntimeError: CUDA error: an illegal access"}
    assert refused == {"section": "toys", "case": "refused", "not available": "unknown key parallel.graph"}
    assert crashed["error"].startswith("the process ended with signal 9")
    assert works == {"section": "toys", "case": "whole", "ms": 2}
    log = (tmp_path / "logs" / "toys_raises.txt").read_text()
    assert "said before" in log
    assert "more of it" in log
    tables = (tmp_path / "rows.md").read_text()
    assert "| | ms | note |" in tables
    assert "| refused |  | not available: unknown key parallel.graph |" in tables


HANGING = """
    def hangs(row):
        if os.fork() == 0:
            time.sleep(3)
            row("outlived", ms=1)
        time.sleep(600)

    def late(row):
        row("late", ms=1)

    def cases(setting):
        return {"hangs": hangs, "late": late}
    """


def test_a_case_that_hangs_is_ended_with_what_it_has_started(sections):
    begun = time.monotonic()
    assert [list(row) for row in sections(HANGING, seconds=1)] == [["section", "case", "not run"]] * 2
    assert time.monotonic() - begun < 300
    time.sleep(3)
    assert "outlived" not in [row["case"] for row in sections("def cases(setting): return {}", seconds=1)]


def test_a_section_that_cannot_be_imported_is_one_row(sections):
    (row,) = sections("import no_such_package", seconds=1)
    assert row["error"] == "ModuleNotFoundError: No module named 'no_such_package'"


def test_wheels_are_unpacked_behind_what_is_installed(tmp_path):
    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "wheels" / "toy-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("toy/__init__.py", "")
        wheel.writestr("torch/__init__.py", "raise ImportError('the wrong torch')")
    rows, *_ = run(tmp_path, "--wheels", "wheels", "--sections", "keyed numbers")
    assert all("error" not in row for row in rows)


@pytest.mark.slow
def test_every_section_runs_with_tiny_sizes(tmp_path):
    rows, tables, _ = run(tmp_path, "--minutes", "60")
    assert [row for row in rows if {"error", "not run"} & row.keys()] == []
    figures = {row["case"]: row for row in rows}
    assert len({row["section"] for row in rows}) == 10
    assert figures["2 clips, text, eager"]["ms a step"] > 0
    assert "costliest" in figures["2 clips, no text, eager, profiled"]
    assert figures["diffusers-style, 2 clips, ours eager"]["peer / ours"] > 0
    assert figures["LoRA as one function"]["off / on"] > 0
    resumed = figures["ddp, killed, resumed under ddp"]
    assert (resumed["steps in the end"], resumed["to the bit"]) == (12, "yes")
    assert 4 <= resumed["killed after steps"] < 12
    for name in ("fsdp2", "zero1", "zero2", "zero3", "ddp, 2 micro batches", "ddp, recomputed"):
        assert figures[name]["furthest from ddp"] < 0.01
    two = next(row for row in rows if row["section"] == "two ranks on one card")
    assert two["steps"] == 12
    assert two["largest relative difference"] < 1e-3
    assert "aten::" in tables
