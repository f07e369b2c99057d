"""What an upload beside training costs a step: python benchmarks/upload.py [--mib 64] [--blocks 12] [--steps 40].

One run of the recipe `tiny` takes blocks of steps in turn without and with an upload: in every second block,
checkpoints of some size are sent to an S3 server on this machine (moto's, from the extra `dev`), one after the other. A
pair of neighbouring blocks gives one ratio, and the median of all counts, with its quartiles. *CPU* is the processor
time of the training process alone, which the load of the machine moves little; *wall* also has what the uploading
process and the server take from the two cores. The program prints a Markdown table.
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
from trainer.stop import Stop
from trainer.training import Training, set_up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=64, help="size of a checkpoint")
    parser.add_argument("--blocks", type=int, default=12, help="pairs of blocks")
    parser.add_argument("--steps", type=int, default=40, help="steps of a block")
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
    """Measure a pair of blocks; returns seconds a step without and with an upload, and the bytes that went."""
    values = {f"param/{i}": torch.randn(options.mib << 16) for i in range(4)}  # 4 × 4 bytes × 2^16 are a MiB
    samples = 10**9 + 1000 * number
    paths = [checkpoint.save(t.run.checkpoints, samples + i, whole_ranges(values), t.facts) for i in range(2)]
    os.sync()
    block(t, 5)
    without = block(t, options.steps)
    t.uploads.checkpoint(paths[0])
    with_upload, sent = [], 0
    while len(with_upload) < options.steps:
        if not t.uploads.held:
            sent += 1
            t.uploads.checkpoint(paths[1] if sent % 2 else paths[0])
        with_upload += block(t, 1)
    while t.uploads.held:
        time.sleep(0.1)
    checkpoint.discard(paths)
    pair = {"without": _means(without), "with": _means(with_upload), "sent": sent + 1}
    say(f"pair {number}: {pair}")
    return pair


def block(t: Training, steps: int) -> list[tuple[float, float]]:
    """Take some steps; return the wall and CPU seconds of each."""
    taken = []
    for _ in range(steps):
        wall, cpu = time.perf_counter(), time.process_time()
        train_step(t)
        taken.append((time.perf_counter() - wall, time.process_time() - cpu))
    return taken


def _means(taken: list[tuple[float, float]]) -> tuple[float, float]:
    walls, cpus = zip(*taken, strict=True)
    return statistics.median(walls), statistics.fmean(cpus)


def table(pairs: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """Return the ratios as a Markdown table."""
    rows = []
    for title, index in (("CPU of the training process", 1), ("wall", 0)):
        ratios = [pair["with"][index] / pair["without"][index] for pair in pairs]
        low, middle, high = statistics.quantiles(ratios, n=4)
        step = statistics.median(pair["without"][index] for pair in pairs)
        rows.append(f"| {title} | {1000 * step:.1f} | {middle:.4f} | {low:.4f} to {high:.4f} |")
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


if __name__ == "__main__":
    main()
