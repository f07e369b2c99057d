"""Compare ways to teach D a few steps: python benchmarks/distill.py RUN FOLDER [--samples 600] [--clips 32].

RUN is a run of the demo's sizes whose `finetune` is done. Each row trains `distill` on the same clips, with the same
noise and settings, and differs in its loss alone:

* `trajectory`: the loss of the stage, see `trainer.distillation`;
* `trajectory, Huber`: the same, with errors beyond a tenth counted linearly;
* `consistency`: the teacher takes one of its steps from the noised original, and the student's own prediction goes on
  from there to where the step ends (arXiv 2303.01469, 2310.02279), so that no decode is needed.

The figures are those of benchmarks/decode.py. A row that FOLDER already holds is not trained again.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import decode  # noqa: E402

from models.diffusion import Network, Prediction  # noqa: E402
from models.flow_map import output_of, step, x0_of_step  # noqa: E402
from models.lora import ADAPTER, using  # noqa: E402
from models.samplers import network_of  # noqa: E402
from trainer import distillation  # noqa: E402
from trainer.distillation import TrajectoryDistiller  # noqa: E402
from trainer.formatting import aligned  # noqa: E402
from trainer.inputs import Inputs  # noqa: E402
from trainer.loop import train  # noqa: E402
from trainer.losses import Losses  # noqa: E402
from trainer.randomness import integers, keys, normal  # noqa: E402
from trainer.recipes.reading import load_recipe  # noqa: E402

HUBER = 0.1
STEPS = (1, 2, 4)


class Huber(TrajectoryDistiller):
    """The stage's loss, less sensitive to large errors."""

    def distance(self, prediction: Prediction, mask: Tensor | None) -> Tensor:
        """Return each row's mean error (rows,), as large as the square of small errors."""
        error = (prediction.output - prediction.target).square()
        return (2 * HUBER**2 * ((1 + error / HUBER**2).sqrt() - 1)).mean(dim=(1, 2))


class Consistency(TrajectoryDistiller):
    """Steps between drawn levels, as many a clip as the stage's; they end where a few-step decode's do."""

    def forward(self, inputs: Inputs) -> Losses:
        """Compute the student's error in steps whose targets the teacher and the student make together."""
        if not self.searches:  # the plan's tensors have shapes, and this has as many rows
            return super().forward(inputs)
        draws = self.drawn(inputs)
        rows = sum(len(spans) for spans in self.spans.values())
        x0_BCT = torch.cat([inputs.x0] * rows).float()
        noise_BCT = torch.cat([normal(draws["noise_key"], *inputs.x0.shape[1:])] * rows)
        with torch.no_grad():
            condition = self.conditions(inputs.x0, draws)["condition"]
            conditions = {"condition": torch.cat([condition] * rows)}
            places = self.drawn_places(inputs.positions, rows)
            t_B, s_B, r_B = (torch.tensor([self.solver.levels[place[n]].t for place in places]) for n in range(3))
            x_t = self.diffusion.corrupt(x0_BCT, noise_BCT, t_B)
            with using(self.dit, ADAPTER):
                x_s = step(self.diffusion, self.diffusion.denoise(self.bound(conditions), x_t, t_B), x_t, t_B, s_B)
            x_r = step(self.diffusion, self.student_x0(conditions, x_s, s_B, r_B), x_s, s_B, r_B)
            x_r = torch.where((s_B == r_B)[:, None, None], x_s, x_r)
            target = output_of(self.diffusion, x0_of_step(self.diffusion, x_t, x_r, t_B, r_B), x_t, t_B)
        network = self.distilled.network_to(self.dit, self.diffusion, conditions)(t_B, r_B)
        prediction = Prediction(self.diffusion, self.diffusion.predict(network, x_t, t_B), target, x_t, t_B)
        errors_B = prediction.squared_error().unflatten(0, (rows, -1)).mean(0)
        return Losses({"consistency": errors_B}, torch.full_like(errors_B, 0.5))

    def bound(self, conditions: Mapping[str, Tensor]) -> Network:
        """Bind the teacher's conditions."""
        return network_of(self.dit, conditions, guidance=self.distilled.sampling.guidance)

    def student_x0(self, conditions: Mapping[str, Tensor], x_s: Tensor, s_B: Tensor, r_B: Tensor) -> Tensor:
        """Return the student's estimate for steps from s to r; any number where s is 0."""
        above_B = s_B.clamp_min(self.solver.levels[-2].t)
        network = self.distilled.network_to(self.dit, self.diffusion, conditions)(above_B, r_B)
        return self.diffusion.denoise(network, x_s, above_B)

    def drawn_places(self, positions_B: Tensor, rows: int) -> list[tuple[int, int, int]]:
        """Draw where each row's step starts and ends, and where the teacher's step ends, in the teacher's schedule."""
        ends = sorted({end for spans in self.spans.values() for _, end in spans})
        drawn = []
        for row in range(rows):
            of_row = integers(keys(self.seed, f"{self.purpose}/span {row}", positions_B), len(self.solver.levels) - 1)
            for start in of_row.tolist():
                later = [end for end in ends if end > start]
                drawn.append((start, start + 1, later[(start + row) % len(later)]))
        return drawn


ROWS = {"trajectory": TrajectoryDistiller, "trajectory, Huber": Huber, "consistency": Consistency}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("folder", type=Path, help="for the runs")
    parser.add_argument("--samples", type=int, default=600, help="clips of `distill` (default: %(default)s)")
    parser.add_argument("--clips", type=int, default=32, help="held-out clips to score (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = []
    for title, kind in ROWS.items():
        run = options.folder / f"{title.replace(', ', '_')}_{options.samples}"
        table = decode.measured(trained(options, run, kind), clips=options.clips, steps=STEPS, plain=not lines)
        lines += [("loss", *table.lines[0])] if not lines else []
        lines += [(title if line[1] == "distilled" else "", *line) for line in table.lines[1:]]
    print(f"\n{datetime.now(UTC).date()}, {platform.machine()}, torch {torch.__version__}, {options.samples} clips\n")
    print(aligned(lines))


def trained(options: argparse.Namespace, run: Path, kind: type[TrajectoryDistiller]) -> Path:
    """Train a row, and return its run."""
    for stage in ("pretrain", "autoencode", "quantize", "finetune"):
        if not (run / stage).exists():
            shutil.copytree(options.run / stage, run / stage)
    sizes = ["global_batch=4", "lr=8.0e-4", "decay=0.6", "warmup=40", "ema_halflife=60", "crop_frames=126"]
    settings = [f"distill.{setting}" for setting in (f"samples={options.samples}", *sizes)]
    quiet = ["parallel.threads=1", "log.samples_every=0", "checkpoint.every=1000000", "parallel.device=cpu"]
    recipe = str(options.run / "finetune" / "config.yaml")
    distillation.TrajectoryDistiller = kind  # type: ignore[misc]
    train(load_recipe(recipe, [f"run_dir={run}", *settings, *quiet]), "distill")
    return run


if __name__ == "__main__":
    main()
