"""How much of a device's arithmetic training uses: a sample's FLOPs, counted once from the model, and MFU."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from trainer.inputs import Inputs
from trainer.losses import Losses
from trainer.memory.activations import give_storage
from trainer.memory.outline import dit_config, outlined_task
from trainer.recipes.schema import Config

logger = logging.getLogger(__name__)

COUNTED_AFTER = 60.0  # seconds of training
PEAK_TFLOPS = {
    "B200": 2250,
    "H200": 989,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "A40": 150,
    "A10G": 70,
    "A10": 125,
    "V100": 125,
    "RTX 5090": 210,
    "RTX 4090": 165,
    "RTX 3090": 71,
}
"""Dense half-precision TFLOP/s of devices with accumulation in float32, by a part of their names, as their maker gives
them. A longer name stands before the shorter one that is a part of it."""


class FlopCounter(TorchDispatchMode):
    """Sums the FLOPs of matrix products and attention inside a `with`, by operation.

    The backward pass of attention counts as twice its forward pass: what a kernel computes again is no use of the model
    (arXiv 2204.02311, appendix B).
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        result = function(*arguments, **(options or {}))
        packet = function._overloadpacket  # type: ignore[attr-defined]
        name = packet.__name__
        if name.startswith("_scaled_dot_product"):
            backward = name.endswith("_backward") or "backward_for" in name
            shapes = [value.shape for value in (arguments[1:4] if backward else arguments[:3])]
            self.found[name] += (2 if backward else 1) * sdpa_flop_count(*shapes)
        elif name == "addmm_":
            self.found[name] += 2 * arguments[1].shape[0] * arguments[1].shape[1] * arguments[2].shape[1]
        elif packet in flop_registry:
            self.found[name] += flop_registry[packet](*arguments, **(options or {}), out_val=result)
        return result


def sample_flops(config: Config, stage: str) -> int:
    """Return the FLOPs of matrix products and attention in the forward and backward pass of one sample.

    The stage's module runs on a sample of `crop_frames` frames of fake tensors, which have no values. What a quantizer
    searches is not counted, and neither is what activation checkpointing computes again.
    """
    dit = dit_config(config, stage)
    task = outlined_task(config, stage, dit)
    with FakeTensorMode(), FlopCounter() as counter:
        give_storage(task.module, torch.float32, lower_trained=False)
        x0_BCT = torch.zeros(1, dit.channels, config.stage(stage).crop_frames)
        losses: Losses = task.module(Inputs(x0=x0_BCT, positions=torch.arange(1)))
        losses.total({}).mean().backward()
    return counter.found.total()


def peak_tflops(device_name: str, precision: str) -> float | None:
    """Return a device's highest TFLOP/s; None if it is unknown, or if training does not use half precision."""
    if precision == "fp32":
        return None
    return next((float(peak) for part, peak in PEAK_TFLOPS.items() if part in device_name), None)


class Throughput:
    """Says how fast the devices compute, from the samples that all ranks together see in a second."""

    def __init__(self, config: Config, stage: str, *, ranks: int, device: torch.device) -> None:
        self.config, self.stage, self.ranks, self.device = config, stage, ranks, device
        self.begun = time.monotonic()

    def of(self, samples_per_second: float) -> dict[str, float]:
        """Return `tokens_per_second` of D's latent tokens, `tflops` of a rank, and `mfu` where the peak is known.

        Nothing in the first minute: to count takes seconds, and shorter runs go without.
        """
        if time.monotonic() - self.begun < COUNTED_AFTER or not self._flops:
            return {}
        tflops = self._flops * samples_per_second / self.ranks / 1e12
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else ""
        peak = peak_tflops(name, self.config.parallel.precision)
        tokens = round(self._tokens * samples_per_second, 1)
        found = {"tokens_per_second": tokens, "tflops": float(f"{tflops:.4g}")}
        return found if peak is None else {**found, "mfu": round(tflops / peak, 4)}

    @cached_property
    def _flops(self) -> int:
        """A sample's FLOPs; 0 if the files of the base model can't be read now, for which no training ends."""
        try:
            return sample_flops(self.config, self.stage)
        except (OSError, ValueError) as error:
            logger.warning("the log has no TFLOP/s: %s", error)
            return 0

    @cached_property
    def _tokens(self) -> int:
        return self.config.stage(self.stage).crop_frames // dit_config(self.config, self.stage).patch_size
