"""An example of a second loss term: an objective gives the term its name, and a recipe its weight."""

from __future__ import annotations

from trainer.objectives import Denoiser
from trainer.tasks import Pretrain


class WithMagnitudes(Denoiser):
    """Also how far the magnitudes of D's estimate of x0 are from those of x0."""

    def terms(self, inputs, prediction):
        error_BCT = prediction.x0.abs() - inputs.x0.abs()
        return {
            **super().terms(inputs, prediction),
            "magnitudes": error_BCT.square().mean((1, 2)),
        }  # without buckets no frame is padding


class PretrainOnMagnitudes(Pretrain):
    def __init__(self, config, stage, models):
        super().__init__(config, stage, models)
        self.module = WithMagnitudes(config, stage, self.dit)
