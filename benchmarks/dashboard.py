"""How fast `spresso dashboard` answers: python benchmarks/dashboard.py [--runs 500] [--lines 1000000].

Prints one table: the overview of many runs, and the curves of a long metrics.jsonl, for the first time and again. The
runs are of three stages each, with 2,000 lines in each stage's metrics.jsonl. Of both, an answer has what was read in
half a second, and the page shows how far it is; the table also has the time until all was read.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from launch.dashboard.curve_store import CurveStore
from launch.dashboard.overview import Overview
from trainer.formatting import aligned

STAGES = ("pretrain", "autoencode", "finetune")


def line(number: int) -> str:
    """A line of a training, with the values that a GPU's has."""
    loss = 1 / (1 + number / 500)
    values = {
        "kind": "train", "samples": 256 * number, "time": 1.7e9 + 20 * number, "loss": loss,
        "loss_bins": [loss * (1 + bin_ / 8) for bin_ in range(8)],
        "loss_terms": {"denoising": loss, "commitment": loss / 9},
        "lr": 1e-4, "grad_norm": 0.3, "samples_per_second": 812.5, "tokens_per_second": 34125.0, "tflops": 402.1,
        "mfu": 0.4066, "data_wait": 0.001, "save_stall_seconds": 0.0, "peak_gib": 61.25,
        "step_seconds": [0.31, 0.31, 0.32], "own_seconds": [0.3, 0.3, 0.31], "slow_ranks": [],
    }  # fmt: skip
    return json.dumps(values) + "\n"


def write_runs(folder: Path, count: int, lines: int) -> None:
    """Write runs as a training leaves them."""
    text = "".join(map(line, range(1, lines + 1)))
    status = json.dumps({"state": "done", "samples": 256 * lines, "of": 256 * lines, "loss": 0.2})
    for number in range(count):
        for stage in STAGES:
            (made := folder / f"run_{number:04}" / stage).mkdir(parents=True)
            (made / "metrics.jsonl").write_text(text)
            (made / "status.json").write_text(status)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds that a call takes, and its result."""
    begun = time.perf_counter()
    result = work()
    return time.perf_counter() - begun, result


def overview(folder: Path, runs: int) -> list[tuple[str, str]]:
    """Measure the overview."""
    write_runs(folder, runs, 2000)
    shown = Overview(folder.resolve())
    first, answer = timed(lambda: shown.rows(seconds=0.5))
    begun, answers, rows = time.perf_counter(), 1, runs - answer["missing"]
    while answer["missing"]:
        answer, answers = shown.rows(seconds=0.5), answers + 1
    whole = first + time.perf_counter() - begun
    again, _ = timed(lambda: shown.rows(seconds=0.5))
    return [
        (f"overview of {runs:,} runs: first answer, with {rows:,} of them", f"{first:.2f} s"),
        (f"… all of them, in {answers} answers", f"{whole:.2f} s"),
        ("… again", f"{1000 * again:.0f} ms"),
    ]


def curves(path: Path, lines: int) -> list[tuple[str, str]]:
    """Measure a long file."""
    with path.open("w") as file:
        file.writelines(map(line, range(1, lines + 1)))
    store = CurveStore()
    first, answer = timed(lambda: store.answer(path))
    begun = time.perf_counter()
    while answer["read"]:
        answer = store.answer(path)
    whole = first + time.perf_counter() - begun
    again, _ = timed(lambda: store.answer(path))
    zoomed, _ = timed(lambda: store.answer(path, low=1e6, high=2e6))
    with path.open("a") as file:
        file.write(line(lines + 1))
    new, answer = timed(lambda: store.answer(path, since=answer["token"]))
    sizes = f"{len(json.dumps(answer)):,} B"
    return [
        (f"a file of {lines:,} lines, {path.stat().st_size >> 20} MiB: first answer", f"{first:.2f} s"),
        ("… all of it read", f"{whole:.1f} s"),
        ("… all curves, thinned to 600 pixels", f"{1000 * again:.0f} ms"),
        ("… a zoom", f"{1000 * zoomed:.0f} ms"),
        (f"… one new line ({sizes})", f"{1000 * new:.1f} ms"),
        ("memory of the process", f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MiB"),
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--lines", type=int, default=1_000_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [*overview(Path(folder) / "runs", options.runs), *curves(Path(folder) / "metrics.jsonl", options.lines)]
    print(aligned(rows, right=(1,)))


if __name__ == "__main__":
    main()
