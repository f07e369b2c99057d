"""Measure what trackers cost a step: python benchmarks/trackers.py [--pairs N] [--json FILE].

The real loop runs twice, as one rank each: with TensorBoard, W&B, MLflow, Trackio and the file for Prometheus, all of
them offline, and with none. The two take turns, a block of steps each, which has one line of the log; which one goes
first alternates. The CPU time of a side counts all its threads, and the processes that its trackers have started. What
the start of the trackers costs, once for each run, is not a part of the ratio. As two sides differ by more than
trackers cost, the last row counts it: the CPU time of the trackers' threads, of their processes, and of the training
thread while it hands events over, to that of a step. The program prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import psutil
import ranks
from overhead import Side
from overhead_loops import BLOCK, GLOBAL_BATCH, RECIPE
from subject import STAGE, make_base, make_latents, recipe

SIDES, WARM, BAR = ("tracked", "untracked"), 3, 1.005
WITH_RECORD = ("wandb", "mlflow", "trackio")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="a file to write the figures to")
    parser.add_argument("--pairs", type=int, default=30, help="how many pairs of blocks to time (default: %(default)s)")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="spresso-benchmark-"))
    os.environ |= {"TRACKIO_DIR": str(work / "trackio"), "WANDB_MODE": "offline"}
    try:
        config = recipe(work, *RECIPE)
        make_base(work, config)
        make_latents(work, config)
        figures = ranks.conditions("torch", "wandb", "mlflow-skinny", "trackio") | {
            "blocks": measure(work, options.pairs)
        }
    finally:
        shutil.rmtree(work)
    print(table(figures))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def measure(work: Path, pairs: int) -> dict[str, list[dict[str, float]]]:
    """Time both sides in turns; return the seconds and the CPU seconds of each block."""
    sides, blocks = dict[str, Side](), {name: list[dict[str, float]]() for name in SIDES}
    try:
        for name in SIDES:
            sides[name] = Side(name, "ddp", work, world_size=1)
            sides[name].steps(WARM)
        wait_for_trackers(work / "ddp-tracked" / STAGE / "trackers")
        for side in sides.values():
            side.steps(BLOCK)
        for pair in range(pairs):
            for name in SIDES if pair % 2 else reversed(SIDES):
                blocks[name].append(block(sides[name]))
    finally:
        for side in sides.values():
            side.stop()
    return blocks


def wait_for_trackers(folder: Path) -> None:
    """Wait until all trackers have started, which takes seconds."""
    until = time.monotonic() + 300
    while not all((folder / f"{name}.json").exists() for name in WITH_RECORD):
        if time.monotonic() > until:
            raise SystemExit(f"not all trackers have started: {sorted(folder.glob('*'))}")
        time.sleep(0.1)


def block(side: Side) -> dict[str, float]:
    before = cpu_of_children(side)
    steps = {name: sum(each) for name, each in side.steps(BLOCK).items()}
    children = cpu_of_children(side) - before
    return {"seconds": steps["seconds"], "cpu": steps["cpu"] + children, "counted": steps["trackers"] + children}


def cpu_of_children(side: Side) -> float:
    """Return the CPU seconds of the processes that a side's rank has started."""
    children = psutil.Process(side.ranks[0].pid).children(recursive=True)
    return sum(sum(child.cpu_times()[:2]) for child in children)


def table(figures: dict[str, Any]) -> str:
    """Return the figures as a Markdown table."""
    tracked, untracked = (figures["blocks"][name] for name in SIDES)
    lines = [
        f"{ranks.describe(figures)} One rank of one thread, global batch {GLOBAL_BATCH}; {len(tracked)} pairs of "
        f"blocks of {BLOCK} steps, with a line of the log each.",
        "",
        "| of | tracked s/step | untracked s/step | ratio | standard error | pairs from – to | bar | met |",
        "|---|---|---|---|---|---|---|---|",
    ]
    plain_cpu = [block["cpu"] for block in untracked]
    for title, of, ours in (
        ("CPU", "cpu", [block["cpu"] for block in tracked]),
        ("wall", "seconds", [block["seconds"] for block in tracked]),
        ("CPU, counted", "cpu", [block["counted"] + cpu for block, cpu in zip(tracked, plain_cpu, strict=True)]),
    ):
        plain = [block[of] for block in untracked]
        ratios = [mine / other for mine, other in zip(ours, plain, strict=True)]
        ratio = statistics.median(ratios)
        error = 1.253 * statistics.stdev(ratios) / len(ratios) ** 0.5  # of a median of normal values
        lines.append(
            f"| {title} | {statistics.median(ours) / BLOCK:.4f} | {statistics.median(plain) / BLOCK:.4f} | "
            f"{ratio:.4f} | {error:.4f} | {min(ratios):.3f} – {max(ratios):.3f} | ≤ {BAR} | "
            f"{'yes' if ratio <= BAR else 'NO'} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
