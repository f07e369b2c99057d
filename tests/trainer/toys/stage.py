"""A sixth trained stage, as somebody would write it: a row, and a Task. No other file knows of it."""

from __future__ import annotations

from trainer.objectives import LatentDenoiser
from trainer.recipes.schema import Config
from trainer.stages import Stage
from trainer.task_models import Models
from trainer.tasks import CodecTask

POLISH = Stage(
    "polish",
    "f once more, on the quantized z",
    task="tests.trainer.toys.stage:Polish",
    needed=lambda config: config.stage("polish").samples > 0,
    builds_on=("finetune",),
    learned_from=("diffusion", "quantizer"),
    defaults={"samples": 0},
    resources={"nodes": 1},
)


class Polish(CodecTask):
    """f on z_q, all else frozen."""

    def __init__(self, config: Config, stage: str, models: Models) -> None:
        super().__init__(config, stage)
        codec = self._codec_before(models)
        self._take(codec, [codec.f])
        self.module = LatentDenoiser(config, stage, codec, rates=config.rates)
