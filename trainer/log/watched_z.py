"""Measures z on held-out clips during training: how many directions it uses, and what each codebook adds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from models.codec import SPresso
from trainer.effective_rank import effective_rank
from trainer.log.held_out import HeldOutLoss
from trainer.ranks.strategy import Strategy
from trainer.tasks import CodecTask, Task


class WatchedZ:
    """Measures z of the clips of `HeldOutLoss`: the same numbers, to rounding, on any number of ranks."""

    def __init__(self, task: Task, clips: HeldOutLoss) -> None:
        self.codec: SPresso | None = task.codec if isinstance(task, CodecTask) else None
        self.clips = clips
        self._found: dict[str, Any] | None = None

    def __call__(self, strategy: Strategy, between: Callable[[], None]) -> dict[str, Any]:
        """Return the figures; empty for stages without z. `between` is called after each batch. All ranks.

        Returns:
            `z_rank`: the number of directions that hold 99 % of the variance of z. `z_error`, if there is a quantizer:
            for each prefix of the codes, ‖z − z_q‖² relative to the variance of z, by its bits per vector.
        """
        if self.codec is None:
            return {}
        if self._found is None or self._changes:
            self._found = self._measured(self.codec, strategy, between)
        return self._found

    @property
    def _changes(self) -> bool:
        """Whether the stage trains what the figures depend on."""
        assert self.codec is not None
        parts = [self.codec.g, *([] if self.codec.quantizer is None else [self.codec.quantizer])]
        return any(value.requires_grad for part in parts for value in part.parameters())

    def _measured(self, codec: SPresso, strategy: Strategy, between: Callable[[], None]) -> dict[str, Any]:
        parallel, clips = self.clips.parallel, self.clips
        sums: list[Tensor] = []
        with strategy.together():
            parts = zip(clips.x0_BCT.split(clips.micro), clips.counted_B.split(clips.micro), strict=True)
            for x0_BCT, counted_B in parts:
                z_BNZ = codec.g(x0_BCT.to(parallel.device)).transpose(1, 2).float()
                sums.append(_sums(codec, z_BNZ, counted_B.to(parallel.device)))
                between()
        total = parallel.sum(torch.stack(sums).sum(0)).cpu()
        width = codec.config.latent_encoder.z_channels
        moments, errors = total[: (width + 1) ** 2].unflatten(0, (width + 1, width + 1)), total[(width + 1) ** 2 :]
        # the first row and column are those of the constant 1: count, and sums of each channel
        count, mean_Z = moments[0, 0], moments[0, 1:] / moments[0, 0]
        covariance_ZZ = moments[1:, 1:] / count - torch.outer(mean_Z, mean_Z)
        found: dict[str, Any] = {"z_rank": effective_rank(covariance_ZZ)}
        if codec.quantizer is not None:
            variance = covariance_ZZ.trace().clamp(min=torch.finfo(torch.float64).tiny)
            relative = (errors / count / variance).tolist()
            found["z_error"] = {f"{codec.quantizer.bits(m)}_bits": error for m, error in enumerate(relative, start=1)}
        return found


def _sums(codec: SPresso, z_BNZ: Tensor, counted_B: Tensor) -> Tensor:
    """Return, flat and in float64, the sums of products of (1, z), and of the squared errors of each prefix."""
    weights_R = counted_B[:, None].expand(z_BNZ.shape[:2]).flatten()
    z_RZ = z_BNZ.flatten(0, 1)
    with_one_RZ = torch.cat([torch.ones_like(weights_R)[:, None], z_RZ.double()], dim=1)
    sums = [((with_one_RZ * weights_R[:, None]).T @ with_one_RZ).flatten()]
    if (quantizer := codec.quantizer) is not None:
        with torch.autocast(z_RZ.device.type, enabled=False):
            codes_RM = quantizer.encode(z_RZ)
            prefixes = [quantizer.decode(codes_RM[:, :books]) for books in range(1, quantizer.books + 1)]
        errors_MR = torch.stack([(z_q - z_RZ).double().square().sum(-1) for z_q in prefixes])
        sums.append(errors_MR @ weights_R)
    return torch.cat(sums)
