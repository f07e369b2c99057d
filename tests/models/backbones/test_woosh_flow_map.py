"""Woosh-DFlow: its folder's layout, and the embedding of two times by a formula of the test's own.

No released weights are at hand, so nothing here compares with them. The blocks are those of Woosh-Flow, whose golden
tensors they reproduce.
"""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor

from models.backbones.pretrained import dit_from_woosh, load_dit, read_dit_config
from models.backbones.woosh_flow_map import WooshFlowMap
from models.diffusion import FlowMatching
from models.flow_map import sample_flow_map
from models.sizes import WooshFlowMapConfig, decoder_config
from models.weights import save_weights
from tests.models.backbones.test_pretrained import golden

CONFIG, STATE, RECORDED = golden("woosh_flow_short")
FEATURES = CONFIG["dit"]["timestep_features_dim"]
HIDDEN, WIDTH = CONFIG["dit"]["inter_dim"], CONFIG["dit"]["dim"]
X, T = RECORDED["in/x"], RECORDED["in/t"]
TEXT = {"text": RECORDED["in/text"], "text_mask": RECORDED["in/text_mask"]}
R = 0.4 * T


def released() -> dict[str, Tensor]:
    """Tensors as the release names them: Woosh-Flow's, wrapped, and the new embeddings beside them."""
    generator = torch.Generator().manual_seed(3)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    state = {}
    for name, value in STATE.items():
        room, _, rest = name.partition(".")
        state[f"{room}.old_{room}.{rest}" if room in ("preprocessing", "postprocessing") else name] = value
    frequencies = torch.tensor([1 / 10_000 ** (n / (FEATURES // 2)) for n in range(FEATURES // 2)])
    state |= {
        f"preprocessing.{name}.freqs": frequencies.clone()
        for name in ("timestep_features_t", "timestep_features_r", "cfg_features")
    }
    state |= {
        "preprocessing.to_timestep_embed.0.weight": drawn(HIDDEN, 3 * FEATURES),
        "preprocessing.to_timestep_embed.0.bias": drawn(HIDDEN),
        "preprocessing.to_timestep_embed.2.weight": drawn(WIDTH, HIDDEN),
        "preprocessing.to_timestep_embed.2.bias": drawn(WIDTH),
        "preprocessing.timestep_logvar.weight": drawn(FEATURES // 2, 1),
        "preprocessing.to_logvar.0.weight": drawn(128, 2 * FEATURES),
        "preprocessing.to_logvar.0.bias": drawn(128),
        "preprocessing.to_logvar.2.weight": drawn(1, 128),
        "preprocessing.to_logvar.2.bias": drawn(1),
    }
    return state


def folder_of(folder: Path, state: dict[str, Tensor] | None = None) -> Path:
    """A folder as the release has it: the sizes under `ldm`, the models around elsewhere."""
    ldm = {"model_type": "LatentDiffusionModel", "autoencoder": {"path": "checkpoints/Woosh-AE"}, "sigma_data": 1.0}
    around = {"exclude_from_checkpoint": False, "trainable": True, "ldm": ldm | CONFIG}
    OmegaConf.save(OmegaConf.create(around), folder / "config.yaml")
    state = released() if state is None else state
    save_file({f"dit.{name}": value.contiguous() for name, value in state.items()}, folder / "weights.safetensors")
    return folder


def embedded(t_B: Tensor, r_B: Tensor, guidance: float) -> Tensor:
    """The embedding, number by number."""
    state, rows = released(), []
    for t, r in zip(t_B.tolist(), r_B.tolist(), strict=True):
        features: list[float] = []
        for number in (t, r, guidance):
            angles = [number / 10_000 ** (n / (FEATURES // 2)) for n in range(FEATURES // 2)]
            features += [math.cos(angle) for angle in angles] + [math.sin(angle) for angle in angles]
        hidden = state["preprocessing.to_timestep_embed.0.weight"] @ torch.tensor(features)
        hidden += state["preprocessing.to_timestep_embed.0.bias"]
        out = state["preprocessing.to_timestep_embed.2.weight"] @ (hidden * torch.sigmoid(hidden))
        rows.append(out + state["preprocessing.to_timestep_embed.2.bias"])
    return torch.stack(rows)


@pytest.fixture
def flow_map(tmp_path) -> WooshFlowMap:
    loaded = load_dit(folder_of(tmp_path))
    assert isinstance(loaded, WooshFlowMap)
    return loaded.requires_grad_(False)


def test_its_folder_is_loaded_and_its_sizes_are_read(flow_map, tmp_path):
    assert read_dit_config(tmp_path) == flow_map.config
    assert flow_map.diffusion == {"name": "flow_matching", "options": {}}
    values = dataclasses.asdict(flow_map.config)
    assert decoder_config(values) == flow_map.config
    assert isinstance(decoder_config(values), WooshFlowMapConfig)


@pytest.mark.parametrize("guidance", [0.0, 4.5])
def test_it_is_woosh_flow_with_another_embedding_of_time(flow_map, guidance):
    flow = dit_from_woosh(CONFIG, STATE)
    other = embedded(T, R, guidance) - flow.embed_time(T)
    found = flow_map(X, T, time_shift=flow_map.time_shift(T, R, guidance), **TEXT)
    torch.testing.assert_close(found, flow(X, T, time_shift=other, **TEXT), rtol=1e-4, atol=1e-5)


def test_without_the_end_of_a_step_it_is_the_velocity(flow_map):
    assert (flow_map.time_shift(T, T) == 0).all()
    flow = dit_from_woosh(CONFIG, STATE)
    expected = flow(X, T, time_shift=embedded(T, T, 0.0) - flow.embed_time(T), **TEXT)
    torch.testing.assert_close(flow_map(X, T, **TEXT), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 4, 8])
def test_a_step_adds_the_average_velocity_times_its_length(flow_map, steps):
    """As the release steps: x - (t - r) u, where its u is the negative of the last layer's output."""
    x, levels = X.clone(), [1 - n / steps for n in range(steps + 1)]
    for here, there in pairwise(levels):
        t, r = torch.full((len(x),), here), torch.full((len(x),), there)
        shift = embedded(t, r, 4.5) - embedded(t, t, 0.0)
        x = x - (here - there) * -flow_map(x, t, time_shift=shift, **TEXT)
    diffusion = FlowMatching()
    found = sample_flow_map(
        diffusion, flow_map.network_to(TEXT, guidance=4.5), X, levels=diffusion.schedule(steps).tolist()
    )
    torch.testing.assert_close(found, x, rtol=1e-3, atol=1e-4)


def test_an_export_of_it_is_loaded_as_what_it_is(flow_map, tmp_path):
    save_weights(tmp_path / "dit.safetensors", flow_map.state_dict(), dataclasses.asdict(flow_map.config))
    again = load_dit(tmp_path / "dit.safetensors")
    assert isinstance(again, WooshFlowMap)
    assert torch.equal(again(X, T, **TEXT), flow_map(X, T, **TEXT))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preprocessing.cfg_features.freqs": torch.ones(FEATURES // 2)}, "cfg_features.freqs are other frequencies"),
        ({"preprocessing.to_timestep_embed.0.bias": torch.ones(3)}, "to_timestep_embed"),
        ({"preprocessing.new_layer.weight": torch.ones(3)}, "new_layer"),
    ],
)
def test_another_models_tensors_are_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        load_dit(folder_of(tmp_path, released() | change))
