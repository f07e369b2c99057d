"""Load the public Woosh release (arXiv 2604.01929) into this project's models: map its configs, rename its weights."""

from __future__ import annotations

import math
import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypedDict

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from models.autoencoder import VocosAE
from models.autoencoder_sizes import VocosConfig
from models.backbones.woosh_flow_map import flow_map_config, flow_map_from_woosh
from models.dit import DiT
from models.documents import Natural, Size, damaged, fits
from models.sizes import DiTConfig, WooshFlowMapConfig
from models.weights import Fill, Stored, Weights, filled, listed, open_safetensors, read
from models.yaml_document import read_yaml

_MEND = "download the release again"
_DIT_PARTS = {
    "attention_modulation": "mod_proj",
    "attention_out": "out_proj",
    "mlp_modulation": "mod_proj",
    "mlp_in": "w1",
    "mlp_out": "w2",
    "modulation": "mod_proj",
    "out": "out_proj",
}
_DIT_ENDS = {
    "input": "preprocessing.project_in",
    "memory": "preprocessing.memory_tokens_rope",
    "text_pad": "preprocessing.description_pad",
    "text_embed": "preprocessing.to_cond_embed",
    "time_features": "preprocessing.timestep_features",
    "time_embed": "preprocessing.to_timestep_embed",
    "logvar_features": "preprocessing.timestep_logvar",
    "logvar_embed": "preprocessing.to_logvar",
    "output_modulation": "postprocessing.mod_proj",
    "output": "postprocessing.linear",
}
_DIT_FIXED: dict[str, Any] = {
    "model_type": "mmmssflux",
    "n_memory_tokens_rope": 1,
    "n_memory_tokens_description": 0,
    "fixed_timestep_features": False,
    "adaln_last_layer": True,
    "adaln_last_layer_nomod": False,
    "no_description_mask": True,
    "mask_out_before": -1,
    "num_sinks": 0,
    "mlp_act": "gelu",
    "beta_fast": 32,
    "beta_slow": 1,
}
_DIT_IGNORED = ("non_checkpoint_layers", "symmetric_attention_init")  # these only matter in training

_VOCOS_PARTS = {
    "norm_in": "norm",
    "norm_out": "final_layer_norm",
    "mix": "dwconv",
    "mlp_in": "pwconv1",
    "mlp_out": "pwconv2",
    "scale": "gamma",
}
_VOCOS_ENDS = {
    "to_latents": "autoencoder.encoder.proj",
    "to_spectrum": "autoencoder.decoder.head.out",
    "mean": "z_mean",
    "spread": "z_std",
}
_WINDOWS = {"autoencoder.encoder.spec_embed.window", "autoencoder.decoder.head.istft.window"}
_VOCOS_FIXED: dict[str, Any] = {
    "_target_": "woosh.module.model.VocosAutoEncoder",
    "channels": 1,
    "input_layer_norm": True,
    "final_layer_norm": True,
    "stft_normalized": False,
    "spec_embed": "stft-complex",
    "normalize": True,
}
_VOCOS_IGNORED = ("ztransform", "exclude_from_checkpoint", "trainable")  # `ztransform` only matters in training
_HEAD_FIXED: dict[str, Any] = {
    "_target_": "woosh.module.model.vocos.ISTFTCircleHead",
    "padding": "center",
    "conv_pad": "same",
    "conv_kernel": 1,
    "softclip": "softplus",
}


class _DiTSettings(TypedDict):
    io_channels: Size
    dim: Size
    n_layers: Size
    n_multimodal_layers: Natural
    n_heads: Size
    inter_dim: Size
    cond_token_dim: Size
    patch_size: Size
    max_description_length: Size
    max_seq_len: Size
    rope_len_multiplier: float | None
    original_seq_len: Size
    rope_theta: float
    rope_factor: float
    qk_rope_head_dim: Natural
    qk_nope_head_dim: Natural
    qkv_head_dim: Size
    timestep_features_dim: Size
    estimate_logvar: bool


class _NoSettings(TypedDict):
    pass


class _VocosSettings(TypedDict):
    z_dim: Size
    d_model: Size
    intermediate_dim: Size
    n_fft: Size
    hop_length: Size
    num_layers: Size
    enc_num_layers: Natural | None
    sample_rate: Size
    istft_head: dict[str, Any] | None


def load_woosh_folder(folder: str | Path, fill: Fill = filled) -> DiT | VocosAE:
    """Load Woosh-Flow, Woosh-DFlow or Woosh-AE from its folder, which holds `config.yaml` and `weights.safetensors`.

    Raises:
        ValueError: a file is missing or damaged, the weights are a pickle, or the model is another one.
    """
    folder = Path(folder)
    config, is_dit = _read_config(folder)
    state = _open_weights(folder)
    try:
        if is_dit:
            return dit_from_woosh(config, _dit_state(state), fill)
        return autoencoder_from_woosh(config, state, fill)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def read_woosh_sizes(folder: str | Path) -> DiTConfig | VocosConfig:
    """Read the sizes of a release's model from its `config.yaml` alone; raises as `load_woosh_folder` does."""
    config, is_dit = _read_config(Path(folder))
    try:
        return _sizes_of_dit(config) if is_dit else _vocos_config(config)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def _read_config(folder: Path) -> tuple[dict[str, Any], bool]:
    """Read a release's config; return it and whether it is that of a D, which Woosh-DFlow's has under `ldm`."""
    config = _read_yaml(folder / "config.yaml")
    of_dit = config["ldm"] if isinstance(config.get("ldm"), dict) else config
    is_dit = of_dit.get("model_type") == "LatentDiffusionModel"
    if not is_dit and config.get("_target_") != _VOCOS_FIXED["_target_"]:
        raise ValueError(
            f"{folder} holds another model than Woosh-Flow, Woosh-DFlow or Woosh-AE: only these are supported"
        )
    return config, is_dit


def _dit_state(state: Mapping[str, Stored]) -> dict[str, Stored]:
    """Select the DiT's tensors of a Woosh-Flow file; fine-tuned copies may hold the other models, too."""
    own = {name: value for name, value in state.items() if not name.startswith(("autoencoder.", "conditioners."))}
    return {name.removeprefix("dit."): value for name, value in own.items()}


def dit_from_woosh(config: Mapping[str, Any], state: Weights, fill: Fill = filled) -> DiT:
    """Build a DiT with the weights of a Woosh-Flow model, or a `WooshFlowMap` with those of a Woosh-DFlow model.

    Args:
        config: the release's config, of which only `dit` (sizes) and `pred_type` are used; Woosh-DFlow's has them under
            `ldm`.
        state: the release's tensors by their names without the prefix `dit.`.

    Raises:
        ValueError: this DiT does not support the config, or a tensor is missing, unknown or of another shape.
    """
    dit_config = _sizes_of_dit(config)
    # This tensor is empty, because the model has no such tokens; some exports leave it out.
    empty = "memory_tokens_description"
    kept = {name: value for name, value in state.items() if not name.endswith(f".{empty}") or value.shape.numel()}
    if isinstance(dit_config, WooshFlowMapConfig):
        return flow_map_from_woosh(dit_config, kept, _release_dit_name, fill)
    return fill(lambda: DiT(dit_config), kept, "Woosh-Flow weights", _release_dit_name)


def _sizes_of_dit(config: Mapping[str, Any]) -> DiTConfig:
    """Return the sizes of Woosh-Flow's or of Woosh-DFlow's D."""
    return flow_map_config(_dit_config(config["ldm"])) if "ldm" in config else _dit_config(config)


def _dit_config(config: Mapping[str, Any]) -> DiTConfig:
    if config.get("pred_type", "v_pred") != "v_pred":
        raise ValueError(
            f"Woosh config: pred_type is {config['pred_type']!r}, but only 'v_pred' (the velocity) is supported"
        )
    given = fits(config.get("dit", {}), dict[str, Any], "Woosh config: dit", mend=_MEND)
    _check_config("Woosh config: dit", given, used=_DiTSettings, fixed=_DIT_FIXED, ignored=_DIT_IGNORED)
    head_width, patch_size = given["qk_rope_head_dim"] + given["qk_nope_head_dim"], given["patch_size"]
    if not head_width * given["n_heads"] == given["qkv_head_dim"] * given["n_heads"] == given["dim"]:
        raise ValueError("Woosh config: dit: head widths (rope + nope, and qkv) × n_heads must both equal dim")
    if given["max_seq_len"] % patch_size:
        raise ValueError(
            "Woosh config: dit: max_seq_len is not a multiple of patch_size; learned padding is not supported"
        )
    span = int(math.ceil(given["max_seq_len"] / patch_size) * (given["rope_len_multiplier"] or 1))
    return DiTConfig(
        channels=given["io_channels"],
        width=given["dim"],
        depth=given["n_layers"],
        multistream_depth=given["n_multimodal_layers"],
        heads=given["n_heads"],
        hidden_width=given["inter_dim"],
        text_width=given["cond_token_dim"],
        text_tokens=given["max_description_length"],
        patch_size=patch_size,
        rotary_width=given["qk_rope_head_dim"],
        rotary_base=given["rope_theta"],
        rotary_span=span,
        yarn_trained_tokens=math.ceil(given["original_seq_len"] / patch_size),
        yarn_factor=given["rope_factor"],
        time_features=given["timestep_features_dim"],
        predicts_logvar=given["estimate_logvar"],
    )


def autoencoder_from_woosh(config: Mapping[str, Any], state: Weights, fill: Fill = filled) -> VocosAE:
    """Build a VocosAE with the weights of a Woosh-AE model; `z_mean` and `z_std` of the release normalise its latents.

    Raises:
        ValueError: VocosAE does not support the config, or a tensor is missing, unknown or of another shape.
    """
    vocos_config = _vocos_config(config)
    window = torch.hann_window(vocos_config.n_fft)
    for name in _WINDOWS & state.keys():
        if state[name].shape != window.shape or not torch.allclose(read(state[name]).float(), window, atol=1e-6):
            raise ValueError(f"Woosh-AE weights: {name} is not a Hann window of {len(window)} samples: not supported")
    if "z_std" in state and not (read(state["z_std"]) > 0).all():
        raise ValueError("Woosh-AE weights: z_std is not positive, so the model was exported without latent statistics")
    kept = {name: value for name, value in state.items() if name not in _WINDOWS}
    return fill(lambda: VocosAE(vocos_config), kept, "Woosh-AE weights", _release_vocos_name)


def _vocos_config(config: Mapping[str, Any]) -> VocosConfig:
    settings = fits(config.get("istft_head") or {}, dict[str, Any], "Woosh config: istft_head", mend=_MEND)
    head = {"_target_": _HEAD_FIXED["_target_"]} | settings
    _check_config("Woosh config: istft_head", head, used=_NoSettings, fixed=_HEAD_FIXED, ignored=("_partial_",))
    given = {"_target_": _VOCOS_FIXED["_target_"], "normalize": True} | dict(config)
    _check_config("Woosh config", given, used=_VocosSettings, fixed=_VOCOS_FIXED, ignored=_VOCOS_IGNORED)
    return VocosConfig(
        latent_channels=given["z_dim"],
        width=given["d_model"],
        hidden_width=given["intermediate_dim"],
        encoder_depth=given["enc_num_layers"] or given["num_layers"],
        decoder_depth=given["num_layers"],
        n_fft=given["n_fft"],
        hop=given["hop_length"],
        sample_rate=given["sample_rate"],
    )


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        # A value such as ${oc.env:NAME} stays text: a release has no business with the environment.
        config = OmegaConf.to_container(read_yaml(path, mend=_MEND), resolve=False)
    except FileNotFoundError:
        raise ValueError(
            f"{path} does not exist: give a folder of the release, such as checkpoints/Woosh-Flow; `spresso weights` "
            "says how to get it"
        ) from None
    except OmegaConfBaseException as error:
        raise damaged(path, " ".join(str(error).split()), _MEND) from error
    assert isinstance(config, dict)
    return {str(key): value for key, value in config.items()}


def _open_weights(folder: Path) -> dict[str, Stored]:
    weights = folder / "weights.safetensors"
    if weights.is_file():
        return open_safetensors(weights)[1]
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in (".pt", ".pth", ".ckpt", ".bin"))
    if pickles:
        convert = shlex.quote(
            "import torch, safetensors.torch as s; "
            f"s.save_file(torch.load({pickles[0]!r}, weights_only=True), 'weights.safetensors')"
        )
        raise ValueError(
            f"{folder / pickles[0]} is a pickle, which can run code and is not opened: "
            f"if you trust it, convert it in its folder with  python -c {convert}"
        )
    raise ValueError(f"{weights} does not exist: download the release's weights into this folder")


def _check_config(
    where: str, given: Mapping[str, Any], *, used: type[Any], fixed: Mapping[str, Any], ignored: Collection[str]
) -> None:
    """Raise ValueError unless each `used` key has its type, each `fixed` key its value, and no other key is unknown."""
    needed = {*used.__annotations__, *fixed}
    known = {*needed, *ignored}
    problems = [f"{name} is missing" for name in sorted(needed - given.keys())]
    problems += [f"{name} is unknown" for name in sorted(given.keys() - known)]
    problems += [
        f"{name} is {given[name]!r}, only {value!r} is supported"
        for name, value in fixed.items()
        if name in given and given[name] != value
    ]
    if problems:
        raise ValueError(f"{where}: {listed(problems)}")
    fits(given, used, where, mend=_MEND)


def _release_dit_name(ours: str) -> str:
    match ours.split("."):
        case "blocks", index, ("latent" | "text") as stream, part, leaf:
            theirs = {"latent": "x", "text": "description"}[stream]
            if part.startswith("mlp"):
                return f"layers.{index}.ffns.{theirs}.{_DIT_PARTS[part]}.{leaf}"
            return f"layers.{index}.attn.modalities.{theirs}.{_DIT_PARTS.get(part, part)}.{leaf}"
        case "blocks", index, part, leaf:
            return f"layers.{index}.{_DIT_PARTS.get(part, part)}.{leaf}"
        case part, *rest:
            return ".".join((_DIT_ENDS[part], *rest))
    raise AssertionError(ours)


def _release_vocos_name(ours: str) -> str:
    match ours.split("."):
        case ("encoder" | "decoder") as half, "blocks", index, part, *leaf:
            return ".".join(("autoencoder", half, "backbone.convnext", index, _VOCOS_PARTS.get(part, part), *leaf))
        case ("encoder" | "decoder") as half, part, leaf:
            return f"autoencoder.{half}.backbone.{_VOCOS_PARTS.get(part, part)}.{leaf}"
        case part, *leaf:
            return ".".join((_VOCOS_ENDS[part], *leaf))
    raise AssertionError(ours)
