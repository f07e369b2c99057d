"""Compare a frozen base in FP8 with one in bf16 by the loss curve of step 1.

    python benchmarks/base_precision.py RUN [--samples 2000] [--seeds 3]

RUN is a run of the recipe `demo` with its latents and the export of `pretrain`; it is only read. Each seed trains
`autoencode` anew with `parallel.base_precision=same` and `=fp8`, in bf16, on one CPU thread, with the same data, noise
and initial weights. On a CPU the products in FP8 are those of a GPU, but not their speed. The first table has the
denoising error of the averaged weights on held-out clips along the way. In the second, the weights at the end of each
training are measured on D's base in each precision: that of an export in use is float32.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PRECISIONS = ("same", "fp8")
BASES = {
    "float32": ("parallel.precision=fp32",),
    "bf16": ("parallel.precision=bf16",),
    "FP8": ("parallel.precision=bf16", "parallel.base_precision=fp8"),
}
MEASURED = 8
"""Times that the held-out clips are measured in a training."""


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--samples", type=int, default=2000, help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    options = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {precision: [] for precision in PRECISIONS}
    for seed in range(options.seeds):
        for precision in PRECISIONS:
            found[precision].append(measured(options.run, options.samples, precision, seed))
            print(f"seed {seed}, {precision}: {found[precision][-1]}", flush=True)
    print("\n| samples | bf16 | FP8 | FP8 against bf16 |\n|---|---|---|---|")
    for samples in found["fp8"][0]["curve"]:
        compare(str(samples), *([one["curve"][samples] for one in found[precision]] for precision in PRECISIONS))
    print("\n| base when measured | trained on bf16 | trained on FP8 | FP8 against bf16 |\n|---|---|---|---|")
    for base in BASES:
        compare(base, *([one["on"][base] for one in found[precision]] for precision in PRECISIONS))


def compare(title: str, ours: list[float], theirs: list[float]) -> None:
    """Print a row: both means, and the relative differences of the seeds, their mean and half their range."""
    relative = [100 * (other / one - 1) for one, other in zip(ours, theirs, strict=True)]
    half = (max(relative) - min(relative)) / 2
    print(f"| {title} | {_mean(ours)} | {_mean(theirs)} | {statistics.mean(relative):+.3f} % ± {half:.3f} % |")


def _mean(values: Iterable[float]) -> str:
    return f"{statistics.mean(values):.5f}"


def measured(run: Path, samples: int, precision: str, seed: int) -> dict[str, Any]:
    """Train in a process of its own; return what `_train` found."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["trainer.loop", "trainer.tasks", "peft"])
    with server.Pool(1) as pool:
        return pool.apply(_train, (run, samples, precision, seed))


def _train(run: Path, samples: int, precision: str, seed: int) -> dict[str, Any]:
    from trainer import loop
    from trainer.log.metrics import read_metrics
    from trainer.recipes.reading import load_recipe

    every = -(-samples // MEASURED // 8) * 8
    with tempfile.TemporaryDirectory() as folder:
        settings = [
            *(f"data.latents={run / 'latents'}", f"pretrained.folder={run / 'pretrain/export'}", f"seed={seed}"),
            *(f"autoencode.samples={samples}", f"run_dir={folder}", "parallel.device=cpu", "parallel.threads=1"),
            *("log.samples_every=0", "log.clips=1", "sampling.steps=1", f"checkpoint.every={every}"),
            "checkpoint.least_steps=1",
        ]
        trained = ("parallel.precision=bf16", f"parallel.base_precision={precision}")
        loop.train(load_recipe("demo", [*settings, *trained]), "autoencode")
        stage = Path(folder) / "autoencode"
        lines = [line for line in read_metrics(stage / "metrics.jsonl") if line["kind"] == "held_out"]
        on = {base: _held_out(load_recipe("demo", [*settings, *how]), stage / "export") for base, how in BASES.items()}
        return {"curve": {line["samples"]: line["loss"] for line in lines}, "on": on}


def _held_out(config: Any, export: Path) -> float:
    """Return the held-out loss of an export's weights on the base in the recipe's precision."""
    from trainer.checkpoints import resume
    from trainer.log.held_out import HeldOutLoss
    from trainer.ranks.parallel import Parallel
    from trainer.tasks import make_task

    parallel, settings = Parallel(config.parallel), config.stage("autoencode")
    task = make_task(config, "autoencode")
    task.to(parallel.device)
    resume.start(task, str(export))
    strategy = parallel.prepare(task.module, settings)
    return HeldOutLoss(config, settings, parallel, task.module.draws)(strategy, lambda: None)


if __name__ == "__main__":
    main()
