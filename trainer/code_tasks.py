"""The Tasks of the stages that train on codes alone, without D: the quantizer, and the prior over its codes."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from models.prior import Prior
from models.quantizers.quantizer import make_quantizer
from models.quantizers.residual import VECTORS_PER_CODEWORD
from trainer.data.stream import Batch
from trainer.effective_rank import FEWEST, covariance, effective_rank
from trainer.objectives import CodePrior, Quantization, mask_of_z
from trainer.recipes.schema import Config
from trainer.task_models import Models
from trainer.tasks import CodecTask

logger = logging.getLogger(__name__)

_VECTORS_PER_CODEWORD = 16  # for counting how often each code occurs, before the prior is trained


class Quantize(CodecTask):
    """Fits the quantizer on z (step 2), then refines it by gradient descent for `quantize.samples` samples."""

    def __init__(self, config: Config, stage: str, models: Models) -> None:
        super().__init__(config, stage)
        codec = self._codec_before(models)
        codec.quantizer = make_quantizer(config.quantizer.description(config.latent_encoder.z_channels))
        codec.config.rates = config.rates
        self._take(codec, [codec.quantizer])
        self.module = self.quantization = Quantization(config, stage, codec)

    @property
    def statistics(self) -> dict[str, Tensor]:
        """The quantizer's mean and scale of z."""
        assert self.codec.quantizer is not None
        return {f"quantizer.{name}": value for name, value in self.codec.quantizer.named_buffers()}

    @torch.no_grad()
    def initialise(
        self, batches: Iterator[Batch], gather: Callable[[Tensor], Tensor], whole: Iterator[Batch] | None
    ) -> None:
        """Fit the codebooks on z of random crops: the same clip gives other vectors at another frame offset."""
        every = self._vectors(batches, gather, self.config.quantizer.vectors)
        if whole is not None:
            assert self.codec.quantizer is not None
            self._warn_of_few_directions(every)
            fitted = functools.partial(self.reporter.progress, "k-means, codebooks")
            self.codec.quantizer.fit(every, seed=self.config.seed, progress=fitted)

    @torch.no_grad()
    def finish(self, batches: Iterator[Batch], device: torch.device) -> None:
        """Move codewords that no vector uses after training to where they are used."""
        quantizer = self.codec.quantizer
        assert quantizer is not None
        self.to(device)
        vectors = self._vectors(batches, lambda rows: rows, VECTORS_PER_CODEWORD * quantizer.size)
        searched = functools.partial(self.reporter.progress, "searches for idle codewords")
        if left := quantizer.revive(vectors, progress=searched):
            total = quantizer.books * quantizer.size
            logger.warning(
                "%s: %d of %d codewords are still used by none of %d vectors", self.stage, left, total, len(vectors)
            )
        self.to(torch.device("cpu"))

    def _warn_of_few_directions(self, z_NZ: Tensor) -> None:
        rank, channels = effective_rank(covariance(z_NZ)), z_NZ.shape[1]
        if rank < FEWEST * channels:
            self.reporter.warn(
                f"{self.stage}: 99 % of the variance of z lies in {rank} directions of its {channels} channels, so "
                "more bits will hardly be heard: train autoencode for longer, or lower latent_encoder.z_channels"
            )

    def _vectors(self, batches: Iterator[Batch], gather: Callable[[Tensor], Tensor], count: int) -> Tensor:
        vectors: list[Tensor] = []
        while sum(map(len, vectors)) < count:
            batch = next(batches)
            inputs = batch.to(self.codec.device, self.quantization.draws(batch.positions))
            z_BNZ = self.codec.g(self.quantization.at_drawn_gain(inputs)).transpose(1, 2)
            vectors.append(gather(z_BNZ)[gather(mask_of_z(inputs.mask, z_BNZ))])
        return torch.cat(vectors)[:count]


class FitPrior(CodecTask):
    """Trains the prior over codes that compressed files are entropy-coded with; the codes do not change."""

    def __init__(self, config: Config, stage: str, models: Models) -> None:
        super().__init__(config, stage)
        codec = self._codec_before(models)
        codec.prior = Prior(books=config.quantizer.books, size=config.quantizer.size)
        self._take(codec, [codec.prior])
        self.module = CodePrior(config, stage, codec)

    @torch.no_grad()
    def initialise(
        self, batches: Iterator[Batch], gather: Callable[[Tensor], Tensor], whole: Iterator[Batch] | None
    ) -> None:
        """Initialise the prior with each code's frequency at the highest rate."""
        quantizer, prior = self.codec.quantizer, self.codec.prior
        assert quantizer is not None
        assert prior is not None
        codes: list[Tensor] = []
        while sum(map(len, codes)) < min(self.config.quantizer.vectors, _VECTORS_PER_CODEWORD * quantizer.size):
            batch = next(batches)
            z_BNZ = self.codec.g(batch.x0.to(self.codec.device).float()).transpose(1, 2)
            mask_BT = None if batch.mask is None else batch.mask.to(self.codec.device)
            codes.append(gather(quantizer.encode(z_BNZ, books=self.config.rates[0]))[gather(mask_of_z(mask_BT, z_BNZ))])
        prior.fit(torch.cat(codes))
