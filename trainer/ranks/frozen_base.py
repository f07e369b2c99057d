"""The precision in which ranks hold D's frozen base, where it is not that of the computation: FP8."""

from __future__ import annotations

import logging

import torch
from torch import nn

from models.fp8_linear import hold_in_fp8, multiplies_fp8
from trainer.objectives import Denoiser
from trainer.recipes.parallel import ParallelConfig

logger = logging.getLogger(__name__)


def require_device(config: ParallelConfig, device: torch.device) -> None:
    """Raise ValueError if the base is to be in FP8, and the device has no products in FP8."""
    if config.base_precision == "fp8" and not multiplies_fp8(device):
        raise ValueError(
            f"parallel.base_precision=fp8 needs a GPU of compute capability 8.9 or newer (Ada, Hopper, Blackwell), "
            f"which {torch.cuda.get_device_name(device)} is not: remove parallel.base_precision"
        )


def convert_base(module: nn.Module, config: ParallelConfig, device: torch.device) -> None:
    """Convert the linear layers of a stage's frozen D to FP8 on a device, if the recipe says so.

    The base in host memory is read in the precision that it was loaded in, and given up layer by layer. In stages
    without a frozen D nothing changes.
    """
    if config.base_precision != "fp8" or not isinstance(module, Denoiser):
        return
    held = hold_in_fp8(module.dit, device)
    if held.converted or held.left:
        left = f"; {held.left} stay in {config.precision}, because a width is no multiple of 16" if held.left else ""
        logger.info("%d linear layers of D's frozen base are in FP8%s", held.converted, left)
