"""Measure step 1 on one GPU: seconds per step, peak memory next to the plan's, and how long a save stalls training.

python benchmarks/gpu.py                         measures on the first CUDA device
python benchmarks/gpu.py --device cpu --small    runs a tiny model, to check that the benchmark works
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import ranks
import subject

from trainer.checkpoints.saver import Saver
from trainer.log.metrics import read_metrics
from trainer.memory.estimate import GIB, Estimate
from trainer.recipes.schema import Config

STEPS, LINE = 40, 10
LARGE = (
    *("dit.width=1536", "dit.depth=24", "dit.heads=24", "dit.hidden_width=6144", "dit.patch_size=1"),
    *("latent_encoder.patch_size=1", "latent_encoder.width=768", "latent_encoder.encoder_depth=6"),
    *("latent_encoder.upsampler_depth=3", "latent_encoder.heads=12", "lora.rank=64", "autoencode.global_batch=16"),
)
SMALL = ("dit.heads=2", "latent_encoder.heads=2", "autoencode.global_batch=4")
ROWS: dict[str, tuple[str, ...]] = {
    "ddp fp32": (),
    "ddp bf16": ("parallel.precision=bf16",),
    "ddp bf16, compiled": ("parallel.precision=bf16", "parallel.compile=true"),
    "ddp bf16, base in FP8": ("parallel.precision=bf16", "parallel.base_precision=fp8"),
    "ddp bf16, base in FP8, compiled": (
        *("parallel.precision=bf16", "parallel.base_precision=fp8", "parallel.compile=true"),
    ),
    "ddp bf16, recomputed": ("parallel.precision=bf16", "parallel.checkpoint_activations=true"),
    "ddp bf16, 2 micro batches": ("parallel.precision=bf16", "parallel.micro_batch=MICRO"),
    "ddp fp16": ("parallel.precision=fp16",),
    "zero1 bf16": ("parallel.precision=bf16", "parallel.strategy=zero1"),
    "zero2 bf16": ("parallel.precision=bf16", "parallel.strategy=zero2"),
    "zero2 bf16, moments on the host": (
        *("parallel.precision=bf16", "parallel.strategy=zero2", "parallel.offload=optimizer"),
    ),
    "zero3 bf16": ("parallel.precision=bf16", "parallel.strategy=zero3"),
    "fsdp2 bf16": ("parallel.precision=bf16", "parallel.strategy=fsdp2"),
    "fsdp2 bf16, base cut": ("parallel.precision=bf16", "parallel.strategy=fsdp2", "parallel.shard_base=true"),
}


def recipe(folder: Path, device: str, small: bool, row: str) -> Config:
    """Return the recipe of step 1 with the settings of a row and a run directory of its own."""
    size = SMALL if small else LARGE
    batch = int(size[-1].rpartition("=")[2])
    steps = (f"autoencode.samples={STEPS * batch}", f"log.every={LINE * batch}", "log.samples_every=0")
    saves = (f"checkpoint.every={2 * LINE * batch}", "log.held_out=4", "log.clips=1", "sampling.steps=2")
    settings = [setting.replace("MICRO", str(batch // 2)) for setting in ROWS[row]]
    run = f"run_dir={folder / 'runs' / row.replace(' ', '_')}"
    ranked = (run, f"parallel.device={device}", "parallel.processes=1")
    return subject.recipe(folder, *size, *steps, *saves, *ranked, *settings)


def measure(folder: Path, device: str, small: bool, row: str) -> None:
    """Train with the real loop for `STEPS` steps and send the figures that its log and its saver give.

    Each row has a process of its own, so that its peak memory is its own.
    """
    from trainer.loop import train

    os.environ["DS_ACCELERATOR"] = device
    config = recipe(folder, device, small, row)
    stalls, copied = [0.0], Saver.copied

    def timed(saver: Saver) -> None:
        copied(saver)
        if saver.waited_seconds != stalls[-1]:
            stalls.append(saver.waited_seconds)

    Saver.copied = timed  # type: ignore[method-assign]
    train(config, subject.STAGE)
    lines = read_metrics(Path(config.run_dir) / subject.STAGE / "metrics.jsonl")
    lines = [line for line in lines if line["kind"] == "train"]
    estimate = Estimate(config, subject.STAGE, 1)
    ranks.send_result(
        {
            "seconds": statistics.median(line["step_seconds"][1] for line in lines[1:]),
            "clips": config.stage(subject.STAGE).global_batch,
            "measured": lines[-1]["peak_gib"],
            "predicted": estimate.row(estimate.own).parts.total / GIB,
            "stall": statistics.median(stalls[1:]),
            "loss": lines[-1]["loss"],
        }
    )


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return the figures as a Markdown table; a row that could not run has its error instead."""
    lines = [
        "| | s/step | clips/s | peak GiB | planned GiB | measured / planned | a save stalls for s | loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in results.items():
        if "error" in row:
            lines.append(f"| {name} | {row['error']} | | | | | | |")
            continue
        lines.append(
            f"| {name} | {row['seconds']:.3f} | {row['clips'] / row['seconds']:.1f} | {row['measured']:.2f} | "
            f"{row['predicted']:.2f} | {row['measured'] / row['predicted']:.2f} | {row['stall']:.3f} | "
            f"{row['loss']:.4f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true", help="train a D of a few thousand weights")
    parser.add_argument(
        "--rows", nargs="*", default=list(ROWS), choices=ROWS, metavar="ROW", help="rows to measure; default: all"
    )
    parser.add_argument("--json", type=Path, help="a file to write the figures to")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        measure(options.folder, options.device, options.small, options.row)
        return
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("this machine has no CUDA device; --device cpu --small checks that the benchmark runs")
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = recipe(folder, options.device, options.small, "ddp fp32")
        ranks.say(f"the frozen base has {subject.make_base(folder, config) / 1e6:.0f} M weights")
        subject.make_latents(folder, config, samples=256)
        small = ["--small"] if options.small else []
        for row in options.rows:
            arguments = ("--device", options.device, *small, "--row", row, "--folder", folder)
            try:
                results[row] = ranks.run("gpu.py", 1, *arguments, log=folder / "log.txt", seconds=400)
                ranks.say(f"{row}: {results[row]}")
            except SystemExit as failure:
                results[row] = {"error": str(failure).strip().splitlines()[-1][:120]}
                ranks.say(f"{row}: {failure}")
    where = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"\n{where}. {ranks.describe(ranks.conditions('torch', 'deepspeed', 'accelerate'))}\n")
    print(table(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
