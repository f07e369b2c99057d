"""The first of the two files of a second loss term: an objective that gives it a name. The second is the recipe."""

from __future__ import annotations

from trainer.objectives import Denoiser
from trainer.tasks import Pretrain


class WithMagnitudes(Denoiser):
    """Also how far the magnitudes of D's estimate of x0 are from those of x0."""

    def terms(self, inputs, prediction):
        error_BCT = prediction.x0.abs() - inputs.x0.abs()
        return {**super().terms(inputs, prediction), "magnitudes": error_BCT.square().mean((1, 2))}


class PretrainOnMagnitudes(Pretrain):
    def __init__(self, config, stage, models):
        super().__init__(config, stage, models)
        self.module = WithMagnitudes(config, stage, self.dit)
