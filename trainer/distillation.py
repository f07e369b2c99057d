"""The stage `distill`: D's own decodes, of some twelve steps, teach D to arrive at the same sounds in one to four.

The student is D with a second LoRA and the embedding of a step's end (`models.distilled`). It starts as the teacher,
whose steps would then be too long, and learns to take each of its few steps to where the teacher is after several of
its own, from the same noise. One decode of the teacher, of all its intermediate states, teaches every step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from models.codec import SPresso
from models.diffusion import Prediction
from models.distilled import Distilled
from models.flow_map import output_of, places, x0_of_step
from models.lora import ADAPTER, DISTILLED, use, using
from models.samplers import Solver, network_of
from models.sizes import Sampling
from trainer.inputs import Inputs
from trainer.losses import Losses
from trainer.objectives import LatentDenoiser
from trainer.randomness import normal
from trainer.recipes.schema import Config
from trainer.task_models import Models
from trainer.tasks import CodecTask


class Distill(CodecTask):
    """Trains the second LoRA of D and the embedding of a step's end; all else of the codec is frozen."""

    def __init__(self, config: Config, stage: str, models: Models) -> None:
        super().__init__(config, stage)
        codec = self._codec_before(models)
        distilled = Distilled(
            width=codec.dit.config.width,
            steps=config.distillation.steps,
            sampling=dataclasses.asdict(config.sampling),
        )
        codec.add_distilled(distilled)
        use(codec.dit, DISTILLED)  # and not only in the forward pass: the backward pass may compute blocks again
        self._take(codec, [distilled, list(codec.adapter_parameters(DISTILLED).values())])
        self.module = TrajectoryDistiller(config, stage, codec, distilled)

    @property
    def sampling(self) -> Sampling:
        """The most steps that the student takes."""
        return dataclasses.replace(self.config.sampling, steps=max(self.config.distillation.steps))


class TrajectoryDistiller(LatentDenoiser):
    """The error of each of the student's few steps, from the teacher's states, for every number of steps.

    A step's target is the prediction that takes the teacher's state at its start to the teacher's state at its end, so
    that the error has the scale of the formulation's own loss.
    """

    def __init__(self, config: Config, stage: str, codec: SPresso, distilled: Distilled) -> None:
        super().__init__(config, stage, codec, rates=config.rates)
        self.distilled, self.settings = distilled, config.distillation
        of = distilled.sampling.steps
        self.spans = {count: list(pairwise(places(of, count))) for count in distilled.steps}
        """The steps of each number of steps, as places in the teacher's schedule."""
        with torch.device("cpu"):  # and not the memory plan's, whose tensors have no values
            self.solver = Solver(self.diffusion, steps=of, sampler=distilled.sampling.sampler)

    def draws(self, positions_B: Tensor) -> dict[str, Tensor]:
        """Draw all that `LatentDenoiser` does but the noise level, as the teacher's decode has all levels."""
        return {name: value for name, value in super().draws(positions_B).items() if name != "level"}

    def forward(self, inputs: Inputs) -> Losses:
        """Decode with the teacher, and compute the student's error in each step; a term is a number of steps."""
        draws = self.drawn(inputs)
        with torch.no_grad():
            conditions = {**self.conditions(inputs.x0, draws), **inputs.conditions}
            states = self.teacher_states(normal(draws["noise_key"], *inputs.x0.shape[1:]), conditions)
        errors = self.errors(states, conditions, inputs.mask)
        terms = {f"steps_{count}": errors[count] for count in self.spans}
        return Losses(terms, torch.full_like(inputs.x0[:, 0, 0].float(), 0.5))

    def teacher_states(self, noise_BCT: Tensor, conditions: Mapping[str, Tensor]) -> list[Tensor]:
        """Return x (B, C, T) at each level of the teacher's decode."""
        sampling, noise_BCT = self.distilled.sampling, self.distilled.sampling.temperature * noise_BCT.float()
        if not self.searches:
            return [noise_BCT] * (sampling.steps + 1)
        with using(self.dit, ADAPTER):
            network = network_of(self.dit, conditions, guidance=sampling.guidance)
            states = [self.solver.begin(noise_BCT)]
            for done in range(sampling.steps):
                states.append(self.solver.step(network, states[-1], done))
        return [state[0] for state in states]

    def errors(
        self, states: list[Tensor], conditions: Mapping[str, Tensor], mask_BT: Tensor | None
    ) -> dict[int, Tensor]:
        """Return the student's mean error (b,) by its number of steps, computed for all steps at once."""
        spans = [span for of_count in self.spans.values() for span in of_count]
        x_t, x_r = (torch.cat([states[span[end]] for span in spans]) for end in (0, 1))
        t, r = (_repeated([self.solver.levels[span[end]].t for span in spans], like=states[0]) for end in (0, 1))
        repeated = {name: torch.cat([value] * len(spans)) for name, value in conditions.items()}
        mask = None if mask_BT is None else torch.cat([mask_BT] * len(spans))
        network = self.distilled.network_to(self.dit, self.diffusion, repeated)(t, r)
        output = self.diffusion.predict(network, x_t, t)
        target = output_of(self.diffusion, x0_of_step(self.diffusion, x_t, x_r, t, r), x_t, t)
        errors = self.distance(Prediction(self.diffusion, output, target, x_t, t), mask).unflatten(0, (len(spans), -1))
        counts = [len(of_count) for of_count in self.spans.values()]
        return {count: each.mean(0) for count, each in zip(self.spans, errors.split(counts), strict=True)}

    def distance(self, prediction: Prediction, mask: Tensor | None) -> Tensor:
        """Return each row's error (rows,)."""
        return prediction.squared_error(mask)


def _repeated(levels: list[float], *, like: Tensor) -> Tensor:
    """Return each level once for every clip of `like` (b, …), the clips of the first level first."""
    return torch.cat([like.new_full((len(like),), level) for level in levels])
