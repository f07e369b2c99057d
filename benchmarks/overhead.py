"""Compare step times with hand-written loops: python benchmarks/overhead.py [--strategies ddp …] [--json FILE].

The real loop (with its data, log, health checks and moving average) and a hand-written loop under the same strategy
start side by side, on two ranks each. They take turns, a block of steps each, so that other load on the machine affects
both; which loop goes first alternates. The ratio of the two blocks of a turn counts; the real loop writes one line of
its log in each block. The program prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import ranks
from overhead_loops import BLOCK, GLOBAL_BATCH, PLAIN, RECIPE
from ranks import say
from subject import make_base, make_latents, recipe

SIDES, WARM = ("ours", "plain"), 3
BESIDE = {"ddp": "bare PyTorch, DDP", "fsdp2": "FSDP2 by hand"}
BARS = {"ddp": 1.01}
BAR = 1.05
Blocks = dict[str, list[dict[str, list[float]]]]


class Side:
    """One of the two loops, in a process per rank; `steps` lets it run some steps, and it waits in between."""

    def __init__(self, name: str, strategy: str, work: Path, *, world_size: int = 2) -> None:
        address = str(work / f"{strategy}-{name}.socket")
        with Listener(address) as listener:
            log = work / f"{strategy}-{name}.log"
            self.ranks = ranks.start("overhead_loops.py", world_size, name, strategy, work, address, log=log)
            try:
                self.gates = [self._accepted(listener, log) for _ in self.ranks]
                for gate in self.gates:
                    gate.recv()
            except (OSError, EOFError):
                self.stop()
                raise SystemExit(f"the ranks of {name} under {strategy} failed:\n{log.read_text()[-3000:]}") from None

    def _accepted(self, listener: Listener, log: Path) -> Connection:
        listener._listener._socket.settimeout(120)  # type: ignore[attr-defined]
        return listener.accept()

    def steps(self, count: int) -> dict[str, list[float]]:
        """Run `count` steps; return each step's seconds on the slower rank, and its CPU seconds, the ranks' mean.

        `trackers` is the part of the CPU seconds that the trackers take.
        """
        for gate in self.gates:
            gate.send(count)
        of_ranks = [list(zip(*gate.recv(), strict=True)) for gate in self.gates]
        seconds, cpu, trackers = zip(*of_ranks, strict=True)
        return {
            "seconds": [max(step) for step in zip(*seconds, strict=True)],
            "cpu": [statistics.mean(step) for step in zip(*cpu, strict=True)],
            "trackers": [statistics.mean(step) for step in zip(*trackers, strict=True)],
        }

    def stop(self) -> None:
        ranks.stop(self.ranks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="a file to write the figures to")
    parser.add_argument("--strategies", nargs="+", choices=list(PLAIN), default=list(PLAIN), help="default: all")
    parser.add_argument(
        "--pairs",
        type=int,
        default=30,
        help=f"how many pairs of blocks of {BLOCK} steps to time (default: %(default)s)",
    )
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="spresso-benchmark-"))
    try:
        config = recipe(work, *RECIPE)
        frozen = make_base(work, config)
        make_latents(work, config)
        figures = ranks.conditions("torch", "deepspeed") | {"frozen": frozen, "strategies": {}}
        for strategy in options.strategies:
            figures["strategies"][strategy] = measure(strategy, work, options.pairs)
    finally:
        shutil.rmtree(work)
    print(table(figures))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def measure(strategy: str, work: Path, pairs: int) -> Blocks:
    """Time both sides under a strategy; return the times of each side's steps, block by block."""
    begun, sides = time.perf_counter(), dict[str, Side]()
    blocks: Blocks = {name: [] for name in SIDES}
    try:
        for name in SIDES:
            sides[name] = Side(name, strategy, work)
        for side in sides.values():
            side.steps(WARM)
        for pair in range(pairs):
            for name in SIDES if pair % 2 else reversed(SIDES):
                blocks[name].append(sides[name].steps(BLOCK))
    finally:
        for side in sides.values():
            side.stop()
    ratio = statistics.median(ratios(blocks))
    say(f"{strategy}: {ratio:.3f} ({time.perf_counter() - begun:.0f} s)")
    return blocks


def ratios(blocks: Blocks, of: str = "seconds") -> list[float]:
    """Return the time of ours relative to the plain loop's, for each pair of blocks."""
    return [sum(ours[of]) / sum(plain[of]) for ours, plain in zip(blocks["ours"], blocks["plain"], strict=True)]


def table(figures: dict[str, Any]) -> str:
    """Return the figures as a Markdown table."""
    pairs = len(next(iter(figures["strategies"].values()))["ours"])
    lines = [
        f"{ranks.describe(figures)} Two ranks of a thread each, gloo, fp32; {figures['frozen'] / 1e6:.1f} M frozen "
        f"parameters, global batch {GLOBAL_BATCH}; {pairs} pairs of blocks of {BLOCK} steps.",
        "",
        "| strategy | beside | ours s/step | plain s/step | ratio | pairs from – to | of CPU | bar | met |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for strategy, blocks in figures["strategies"].items():
        of_pairs, bar = ratios(blocks), BARS.get(strategy, BAR)
        ours, plain = (statistics.median(statistics.mean(block["seconds"]) for block in blocks[side]) for side in SIDES)
        ratio, cpu = statistics.median(of_pairs), statistics.median(ratios(blocks, "cpu"))
        lines.append(
            f"| {strategy} | {BESIDE.get(strategy, 'DeepSpeed, ZeRO-' + strategy[-1])} | {ours:.3f} | {plain:.3f} | "
            f"{ratio:.3f} | {min(of_pairs):.3f} – {max(of_pairs):.3f} | {cpu:.3f} | ≤ {bar} | "
            f"{'yes' if ratio <= bar else 'NO'} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
