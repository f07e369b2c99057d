"""Woosh-DFlow, the flow map that the authors of Woosh distilled from Woosh-Flow (arXiv 2604.01929), as D.

Blocks, text stream and last layer are Woosh-Flow's. The embedding of the noise level is replaced by one of two noise
levels, where a step starts and where it ends, and of the scale of guidance, which was distilled too. The facts are
those of the published code, at https://github.com/SonyResearch/Woosh: fixed frequencies, one embedding of all three
numbers, the end of a step as a second argument. No output of the released weights was at hand to compare with.

Shape suffixes: B batch, D width, F features.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from models.diffusion import Network
from models.dit import DiT
from models.flow_map import NetworkTo
from models.sizes import DiTConfig, WooshFlowMapConfig
from models.weights import Fill, Weights, filled, read

_SLOWEST = 10_000.0
_NUMBERS = 3
"""Numbers that the embedding takes: where a step starts, where it ends, and the scale of guidance."""
_FREQUENCIES = tuple(
    f"preprocessing.{features}.freqs" for features in ("timestep_features_t", "timestep_features_r", "cfg_features")
)
_UNUSED = (
    *(f"preprocessing.old_preprocessing.{part}." for part in ("timestep_features", "to_timestep_embed")),
    *(f"preprocessing.{old}{part}." for old in ("", "old_preprocessing.") for part in ("timestep_logvar", "to_logvar")),
)
"""What the release holds of Woosh-Flow's embedding, which the new one replaces, and of the loss's log-variance."""


class WooshFlowMap(DiT):
    """D that knows where a step ends. Called without, it is the velocity at t, without guidance."""

    def __init__(self, config: WooshFlowMapConfig) -> None:
        super().__init__(config)
        del self.time_features
        self.time_embed = nn.Sequential(
            nn.Linear(_NUMBERS * config.time_features, config.hidden_width),
            nn.SiLU(),
            nn.Linear(config.hidden_width, config.width),
        )
        self.reset_parameters()

    def embed_time(self, t: Tensor) -> Tensor:
        """Embed steps `t (B,)` that end where they start: `(B, width)`."""
        return self._embed_step(t, t, torch.zeros_like(t))

    def time_shift(self, t: Tensor, r: Tensor, guidance: float = 0.0) -> Tensor:
        """Return the `time_shift` `(B, width)` of steps from the levels t to the levels r, both `(B,)`.

        `guidance` is the release's scale, by which the conditional prediction is led away from the unconditional one;
        0 is no guidance.
        """
        return self._embed_step(t, r, torch.full_like(t, guidance)) - self.embed_time(t)

    def network_to(self, conditions: Mapping[str, Tensor], *, guidance: float = 0.0) -> NetworkTo:
        """Bind conditions, by the names of D's arguments, for `models.flow_map.sample_flow_map`."""

        def network_to(t_B: Tensor, r_B: Tensor) -> Network:
            shift_BD = self.time_shift(t_B, r_B, guidance)
            return lambda x, level: self(x, level, time_shift=shift_BD, **conditions)

        return network_to

    def _embed_step(self, *numbers: Tensor) -> Tensor:
        features_BF = torch.cat([fixed_features(number_B, self.config.time_features) for number_B in numbers], 1)
        return self.time_embed(features_BF.type_as(self.input.weight))


def fixed_features(number_B: Tensor, features: int) -> Tensor:
    """Return cosines and sines of a number at fixed frequencies, from 1 to 1 / 10,000: `(B, features)`, float32."""
    angles_BF = number_B.float()[:, None] * frequencies(features, number_B.device)
    return torch.cat((angles_BF.cos(), angles_BF.sin()), 1)


def frequencies(features: int, device: torch.device | str) -> Tensor:
    """Return the frequencies `(features / 2,)` of `fixed_features`."""
    half = features // 2
    return torch.exp(-math.log(_SLOWEST) * torch.arange(half, dtype=torch.float32, device=device) / half)


def flow_map_config(config: DiTConfig) -> WooshFlowMapConfig:
    """Return the sizes of the flow map that was distilled from a D of these sizes."""
    return WooshFlowMapConfig(**{**dataclasses.asdict(config), "predicts_logvar": False})


def flow_map_from_woosh(
    config: WooshFlowMapConfig, state: Weights, release_name: Callable[[str], str], fill: Fill = filled
) -> WooshFlowMap:
    """Build a flow map with the weights of Woosh-DFlow.

    Args:
        config: its sizes.
        state: the release's tensors by their names without the prefix `dit.`.
        release_name: maps the names of Woosh-Flow's weights here to those in its release.
        fill: builds the model; `outlined` only checks that the weights fit.

    Raises:
        ValueError: a frequency is another than the fixed one, or a tensor is missing, unknown or of another shape.
    """
    expected = frequencies(config.time_features, "cpu")
    for name in state.keys() & set(_FREQUENCIES):
        if state[name].shape != expected.shape or not torch.allclose(read(state[name]).float(), expected, rtol=1e-4):
            raise ValueError(f"Woosh-DFlow weights: {name} are other frequencies than the fixed ones: not supported")
    kept = {name: value for name, value in state.items() if name not in _FREQUENCIES and not name.startswith(_UNUSED)}

    def flow_map_name(ours: str) -> str:
        theirs = release_name(ours)
        room, _, rest = theirs.partition(".")
        wrapped = room in ("preprocessing", "postprocessing") and not ours.startswith("time_embed.")
        return f"{room}.old_{room}.{rest}" if wrapped else theirs

    return fill(lambda: WooshFlowMap(config), kept, "Woosh-DFlow weights", flow_map_name)
