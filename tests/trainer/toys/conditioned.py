"""An example of a second condition of D, part two: a D that takes `gain`, and the Task that asks for it."""

from __future__ import annotations

import torch
from torch import nn

from models.dit import DiT
from tests.trainer.toys.condition import GainReader
from trainer.objectives import Denoiser
from trainer.tasks import Pretrain


class GainDiT(DiT):
    def __init__(self, config):
        super().__init__(config)
        self.of_gain = nn.Parameter(torch.zeros(config.channels))

    def forward(self, x, t, *, gain=None, **conditions):
        predicted = super().forward(x, t, **conditions)
        return predicted if gain is None else predicted + gain[:, None, None] * self.of_gain[:, None]


class PretrainWithGain(Pretrain):
    def __init__(self, config, stage, models):
        super().__init__(config, stage, models)
        self.dit = GainDiT(config.dit)
        self.module = Denoiser(config, stage, self.dit)

    def conditions(self):
        return [*super().conditions(), GainReader()]
