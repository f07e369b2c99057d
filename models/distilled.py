"""What a codec's D needs to decode in few steps: a second LoRA and the embedding of a step's end.

The stage `distill` trains them on D's own decodes, whose guidance, temperature and sampler they reproduce. Encoder, f,
quantizer and D with its first LoRA stay as they are, and so does the model's hash: the same streams are decoded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from models.backbones.woosh_flow_map import WooshFlowMap
from models.decoder import Decoder
from models.diffusion import Diffusion, Network
from models.flow_map import NetworkTo, SecondTime, angle, levels, sample_flow_map
from models.lora import ADAPTER, DISTILLED, using
from models.samplers import generate
from models.sizes import Sampling

if TYPE_CHECKING:
    from models.codec import SPresso


class Distilled(nn.Module):
    """The trained part outside of D's layers, and the settings that D was distilled with."""

    def __init__(self, *, width: int, steps: list[int], sampling: Mapping[str, Any]) -> None:
        """Build a fresh one, with which D's output is unchanged.

        Args:
            width: features of D's embedding of the noise level.
            steps: numbers of steps for which D is distilled.
            sampling: fields of the `Sampling` that was distilled.

        Raises:
            ValueError: a number of steps is not between 1 and that of `sampling`.
        """
        super().__init__()
        self.width, self.steps, self.sampling = width, sorted(steps, reverse=True), Sampling(**sampling)
        if wrong := [count for count in steps if not 1 <= count <= self.sampling.steps]:
            raise ValueError(f"{wrong[0]} steps cannot be distilled from {self.sampling.steps}")
        self.second_time = SecondTime(width)

    def config(self) -> dict[str, Any]:
        """Return the arguments that build this part again."""
        return {"width": self.width, "steps": self.steps, "sampling": dataclasses.asdict(self.sampling)}

    def serves(self, sampling: Sampling) -> bool:
        """Whether these settings are those that were distilled, but for one of the distilled numbers of steps."""
        return (
            sampling.steps in self.steps and dataclasses.replace(sampling, steps=self.sampling.steps) == self.sampling
        )

    def network_to(
        self,
        dit: Decoder,
        diffusion: Diffusion,
        conditions: Mapping[str, Tensor],
        *,
        run: Callable[..., Tensor] | None = None,
    ) -> NetworkTo:
        """Bind D and its conditions as a flow map. D's adapter `DISTILLED` must be in use where it is called.

        A D that is a flow map itself is told where a step ends in its own way, too. `run` calls D, where that is not
        done directly.
        """

        def network_to(t_B: Tensor, r_B: Tensor) -> Network:
            shift_BD = self.second_time(angle(diffusion, t_B), angle(diffusion, r_B))
            if isinstance(dit, WooshFlowMap):
                shift_BD = shift_BD + dit.time_shift(t_B, r_B)
            return lambda x, level: (run or dit)(x, level, time_shift=shift_BD, **conditions)

        return network_to


def decode_x0(
    codec: SPresso,
    dit: Callable[..., Tensor],
    noise_BCT: Tensor,
    conditions: Mapping[str, Tensor],
    *,
    sampling: Sampling,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Sample x0 (B, C, T) with the distilled D if it serves these settings, and else as `models.samplers.generate`.

    Args:
        codec: the codec.
        dit: its D, or what runs its D on windows.
        noise_BCT: standard gaussian noise.
        conditions: D's conditions by the names of its arguments.
        sampling: sampler, steps, guidance and temperature.
        progress: called after every step with (steps done, steps).
    """
    distilled = codec.distilled
    if distilled is None:
        return generate(dit, codec.diffusion, noise_BCT, conditions, sampling=sampling, progress=progress)
    if not distilled.serves(sampling) or not conditions:
        with using(codec.dit, ADAPTER):
            return generate(dit, codec.diffusion, noise_BCT, conditions, sampling=sampling, progress=progress)
    with using(codec.dit, DISTILLED):
        return sample_flow_map(
            codec.diffusion,
            distilled.network_to(codec.dit, codec.diffusion, conditions, run=dit),
            sampling.temperature * noise_BCT,
            levels=levels(codec.diffusion, distilled.sampling.steps, sampling.steps),
            progress=progress,
        )
