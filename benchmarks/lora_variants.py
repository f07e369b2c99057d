"""Compare the variants of D's LoRA, and the averages that are exported, at one budget of step 1.

    python benchmarks/lora_variants.py RUN [--samples 480]

RUN is a run of the recipe `demo` with its latents and the export of `pretrain`; it is only read. Each row trains
`autoencode` anew for the same samples on one CPU thread, with the same data, noise and seed. The tables give the
trained parameters; CPU seconds of the training process for a step (the median), which other processes on the machine
change less than they change its seconds; the peak resident memory; and the held-out loss of the averaged weights.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from models.sizes import LORA_VARIANTS

PROFILES = "[0.05,0.1]"


def main() -> None:
    """Print the table of the averages and that of the variants."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--samples", type=int, default=480)
    options = parser.parse_args()
    plain = measured(options.run, options.samples, "lora.variant=plain")
    profiled = measured(options.run, options.samples, f"autoencode.ema_profiles={PROFILES}")
    print("| average | profile's error | held-out loss | CPU s a step | checkpoint MiB | snapshots MiB |")
    print("|---|---|---|---|---|---|")
    print(f"| half-life 200 | | {plain['loss']:.5f} | {plain['cpu']:.3f} | {plain['checkpoint']:.1f} | 0 |")
    for row in profiled["averages"]:
        cost = f"{profiled['cpu']:.3f} | {profiled['checkpoint']:.1f} | {profiled['snapshots']:.1f}"
        name = f"width {row['width']:g}" + (", exported" if row["width"] == profiled["average"] else "")
        print(f"| {name} | {row['error']:.1%} | {row['loss']:.5f} | {cost} |", flush=True)
    print("\n| LoRA | trained in D, thousands | CPU s a step | peak MiB | checkpoint MiB | held-out loss |")
    print("|---|---|---|---|---|---|")
    for variant in LORA_VARIANTS:
        found = measured(options.run, options.samples, f"lora.variant={variant}") if variant != "plain" else plain
        cells = (f"{found['cpu']:.3f}", f"{found['mib']:.0f}", f"{found['checkpoint']:.1f}", f"{found['loss']:.5f}")
        print(f"| {variant} | {found['trained'] / 1e3:.1f} | " + " | ".join(cells) + " |", flush=True)


def measured(run: Path, samples: int, *overrides: str) -> dict[str, Any]:
    """Train in a process of its own; return what `_train` found."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["trainer.loop", "trainer.tasks", "peft"])
    with server.Pool(1) as pool:
        return pool.apply(_train, (run, samples, *overrides))


def _train(run: Path, samples: int, *overrides: str) -> dict[str, Any]:
    from trainer import loop
    from trainer.checkpoints.names import folder_name
    from trainer.log.metrics import read_metrics
    from trainer.recipes.reading import load_recipe

    seconds: list[float] = []
    trained: list[int] = []
    step = loop.train_step

    def timed(training: Any) -> Any:
        if not trained:
            named = training.task.learned.items()
            trained.append(sum(value.numel() for name, value in named if name.startswith("dit.")))
        begun = time.process_time()
        taken = step(training)
        seconds.append(time.process_time() - begun)
        return taken

    loop.train_step = timed
    with tempfile.TemporaryDirectory() as folder:
        inputs = [f"data.latents={run / 'latents'}", f"pretrained.folder={run / 'pretrain/export'}"]
        quick = [
            "log.samples_every=0",
            "log.clips=1",
            "log.held_out=32",
            "sampling.steps=1",
            f"checkpoint.every={samples}",
        ]
        cpu = ["parallel.device=cpu", "parallel.threads=1", f"run_dir={folder}", f"autoencode.samples={samples}"]
        loop.train(load_recipe("demo", [*inputs, *quick, *cpu, *overrides]), "autoencode")
        stage = Path(folder) / "autoencode"
        lines = read_metrics(stage / "metrics.jsonl")
        status = json.loads((stage / "status.json").read_text())
        return {
            "cpu": statistics.median(seconds),
            "trained": trained[0],
            "mib": max(line["peak_gib"] for line in lines if line["kind"] == "train") * 1024,
            "checkpoint": _mib(stage / "checkpoints" / folder_name(samples)),
            "snapshots": _mib(stage / "averages"),
            "loss": next(line["loss"] for line in lines if line["kind"] == "held_out"),
            "averages": status.get("averages"),
            "average": status.get("average"),
        }


def _mib(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors")) / 2**20


if __name__ == "__main__":
    main()
