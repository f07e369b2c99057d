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
from models.flow_map import NetworkTo, SecondTime, angle, levels, start, take_step
from models.lora import ADAPTER, DISTILLED, using
from models.samplers import DecodingSteps, GuidedSteps, State
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


class _FewSteps:
    """The steps of the distilled D."""

    def __init__(self, codec: SPresso, distilled: Distilled, sampling: Sampling) -> None:
        self._dit, self._diffusion, self._distilled = codec.dit, codec.diffusion, distilled
        self._temperature, self.steps = sampling.temperature, sampling.steps
        self._levels = levels(codec.diffusion, distilled.sampling.steps, sampling.steps)

    def begin(self, noise_BCT: Tensor) -> State:
        """Return the state before the first step."""
        return (start(self._diffusion, self._temperature * noise_BCT),)

    def step(self, dit: Callable[..., Tensor], conditions: Mapping[str, Tensor], state: State, done: int) -> State:
        """Take a step after `done` earlier ones."""
        network_to = self._distilled.network_to(self._dit, self._diffusion, conditions, run=dit)
        with using(self._dit, DISTILLED):
            return (take_step(self._diffusion, network_to, state[0], *self._levels[done : done + 2]),)


class _UndistilledSteps(GuidedSteps):
    """The steps of a D that was distilled, with its first LoRA."""

    def __init__(self, codec: SPresso, sampling: Sampling) -> None:
        super().__init__(codec.diffusion, sampling)
        self._dit = codec.dit

    def step(self, dit: Callable[..., Tensor], conditions: Mapping[str, Tensor], state: State, done: int) -> State:
        """Take a step after `done` earlier ones."""
        with using(self._dit, ADAPTER):
            return super().step(dit, conditions, state, done)


def steps_of(codec: SPresso, sampling: Sampling, *, conditional: bool = True) -> DecodingSteps:
    """Return the steps in which a codec decodes: the distilled D's if that serves these settings and has a condition.

    The steps take the codec's D, or what runs it on windows.
    """
    if codec.distilled is None:
        return GuidedSteps(codec.diffusion, sampling)
    if conditional and codec.distilled.serves(sampling):
        return _FewSteps(codec, codec.distilled, sampling)
    return _UndistilledSteps(codec, sampling)
