"""What an upload beside training costs a step: python benchmarks/upload.py [--mib 64] [--blocks 40] [--steps 12].

One run of the recipe `tiny` takes blocks of steps in turn without and with an upload of a checkpoint to an S3 server on
this machine (moto's, from the extra `dev`). A pair of neighbouring blocks gives one ratio, and the median of all
counts, with its quartiles. *CPU* is the processor time of the thread that trains, which the load of the machine moves
little; *wall* also has what the uploading process and the server take from the cores. The last row is what an upload
takes of the training process to begin and in any other thread, to the steps that lie between two checkpoints at least.
The program prints a table.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["OMP_NUM_THREADS"] = "1"

import ranks
import torch
from ranks import say

from launch import pipeline
from tests.stores import ENVIRONMENT, S3
from trainer.checkpoints import checkpoint
from trainer.loop import train_step
from trainer.ranks.flat_ranges import whole_ranges
from trainer.recipes.reading import load_recipe
from trainer.recipes.schema import CheckpointConfig
from trainer.stop import Stop
from trainer.training import Training, set_up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=64, help="size of a checkpoint")
    parser.add_argument("--blocks", type=int, default=40, help="pairs of blocks")
    parser.add_argument("--steps", type=int, default=12, help="steps of a block")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work, S3() as server:
        os.environ |= {**ENVIRONMENT, "AWS_ENDPOINT_URL": server.url}
        config = load_recipe(
            "tiny",
            [
                f"run_dir={work}/run",
                f"checkpoint.upload=s3://{server.bucket}/run",
                *("parallel.threads=1", "parallel.device=cpu", "data.workers=1"),
                *("pretrain.samples=1000000", "pretrain.global_batch=32"),
            ],
        )
        pipeline.synth(config)
        pipeline.prepare_latents(config)
        with set_up(config, "pretrain", _InAHurry(), lambda: None) as training:
            pairs = [measure(training, number, options) for number in range(options.blocks)]
    print(table(pairs[1:], options))


class _InAHurry(Stop):
    """Lets the end of the run wait for no upload."""

    def __call__(self) -> bool:
        return False

    def has_less_than(self, seconds: float) -> bool:
        return True


def measure(t: Training, number: int, options: argparse.Namespace) -> dict[str, Any]:
    """Measure a pair of blocks, of which every second pair begins with the upload; return its figures."""
    values = {f"param/{i}": torch.randn(options.mib << 16) for i in range(4)}  # 4 × 4 bytes × 2^16 are a MiB
    path = checkpoint.save(t.run.checkpoints, 10**9 + number, whole_ranges(values), t.facts)
    os.sync()
    block(t, 2)
    pair: dict[str, Any] = {}
    for kind in ("without", "with") if number % 2 else ("with", "without"):
        if kind == "without":
            pair[kind] = block(t, options.steps)
            continue
        listened, begun = _listener_seconds(t), time.thread_time()
        t.uploads.checkpoint(path)
        asked = time.thread_time() - begun
        pair[kind] = block(t, options.steps)
        pair["whole"] = not t.uploads.held  # the block was longer than the upload
        while t.uploads.held:
            time.sleep(0.05)
        pair["upload"] = asked + _listener_seconds(t) - listened
    checkpoint.discard([path])
    say(f"pair {number}: {pair}")
    return pair


def _listener_seconds(t: Training) -> float:
    """Return the CPU seconds of the thread that listens to the uploading process."""
    ident = t.uploads._listener.ident
    assert ident is not None
    return time.clock_gettime(time.pthread_getcpuclockid(ident))


def block(t: Training, steps: int) -> tuple[float, float]:
    """Take some steps; return the wall and CPU seconds of a step, the median and the mean."""
    walls, begun = [], time.thread_time()
    for _ in range(steps):
        wall = time.perf_counter()
        train_step(t)
        walls.append(time.perf_counter() - wall)
    return statistics.median(walls), (time.thread_time() - begun) / steps


def table(pairs: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """Return the ratios as a Markdown table."""
    rows = []
    for title, index in (("CPU of the training thread", 1), ("wall", 0)):
        step = statistics.median(pair["without"][index] for pair in pairs)
        rows.append(_row(title, step, [pair["with"][index] / pair["without"][index] for pair in pairs]))
    between = [pair["without"][1] * CheckpointConfig().least_steps for pair in pairs]
    own = [1 + pair["upload"] / seconds for pair, seconds in zip(pairs, between, strict=True)]
    rows.append(
        _row(f"CPU of an upload here, to {CheckpointConfig().least_steps} steps", statistics.median(between), own)
    )
    return "\n".join(
        [
            ranks.describe(ranks.conditions("torch", "s3fs", "fsspec")),
            f"{len(pairs)} pairs of {options.steps} steps, checkpoints of {options.mib} MiB.",
            "",
            "| a step | ms without | with an upload beside: × | quartiles |",
            "|---|---|---|---|",
            *rows,
        ]
    )


def _row(title: str, seconds: float, ratios: list[float]) -> str:
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"| {title} | {1000 * seconds:.1f} | {middle:.4f} | {low:.4f} to {high:.4f} |"


if __name__ == "__main__":
    main()
