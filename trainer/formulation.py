"""What trained weights mean besides their numbers: the diffusion's formulation, the LoRA's scale, the sizes of z.

The weights fit a recipe that says something else about these, because no shape changes; they would be misread. A stage
that continues others' weights therefore refuses such a recipe.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from yaml import YAMLError

from models.diffusion import make_diffusion
from models.disk_errors import patiently, require_sound_disk
from models.sizes import CodecConfig
from trainer.recipes.schema import Config


def of_recipe(config: Config) -> dict[str, Any]:
    """Return the recipe's `diffusion` and `lora`, as plain values; a checkpoint stores them."""
    return {"diffusion": dataclasses.asdict(config.diffusion), "lora": config.lora.description()}


def require_same(config: Config, trained: Mapping[str, Any], where: object, *, lora: bool = True) -> None:
    """Raise ValueError if weights were trained in another formulation than the recipe's.

    Args:
        config: the recipe.
        trained: `diffusion` and `lora` of the weights, as `of_recipe` returns them; what is missing is not checked.
        where: the file or folder of the weights, for the message.
        lora: whether the weights have a LoRA.
    """
    if trained.get("diffusion"):
        _require_same_diffusion(config, trained["diffusion"], where)
    ours, theirs = dataclasses.asdict(config.lora), trained.get("lora") or {}
    if theirs:
        theirs = {"variant": "plain", **theirs}
    for key in ("rank", "alpha", "variant"):
        if lora and key in theirs and theirs[key] != ours[key]:
            raise ValueError(
                f"{where} was trained with lora.{key}={theirs[key]}, but the recipe says {ours[key]}: set "
                f"lora.{key}={theirs[key]}"
            )


def _require_same_diffusion(config: Config, trained: Mapping[str, Any], where: object) -> None:
    ours = make_diffusion(config.diffusion.name, **config.diffusion.options)
    theirs = make_diffusion(trained["name"], **trained["options"])
    if ours != theirs:
        raise ValueError(
            f"{where} was trained as {theirs}, but the recipe says {ours}: set diffusion.name={trained['name']} and "
            f"diffusion.options={trained['options']}"
        )


def require_same_codec(
    config: Config, codec: CodecConfig, where: object, *, quantizer: Mapping[str, Any] | None = None
) -> None:
    """Raise ValueError if a stage would continue a codec that was made with other settings than the recipe's.

    Args:
        config: the recipe.
        codec: the codec's config.
        where: the codec's export.
        quantizer: the settings of the codec's quantizer, if it has one.
    """
    require_same(config, {"diffusion": codec.diffusion, "lora": codec.lora}, where)
    by_models = {key: getattr(codec.latent_encoder, key) for key in ("latent_channels", "signed_channels")}
    shapes = dataclasses.asdict(config.latent_encoder) | by_models
    pairs: list[tuple[str, Mapping[str, Any], Mapping[str, Any]]]
    pairs = [("latent_encoder", dataclasses.asdict(codec.latent_encoder), shapes)]
    if quantizer is not None:
        pairs.append(("quantizer", quantizer, config.quantizer.description(codec.latent_encoder.z_channels)))
    for section, theirs, ours in pairs:
        differing = [key for key in theirs if theirs[key] != ours.get(key)]
        if differing:
            key = differing[0]
            raise ValueError(
                f"{where} has {section}.{key}={theirs[key]}, but the recipe says {ours.get(key)}: set "
                f"{section}.{key}={theirs[key]}, or train the stage that made it anew in another run_dir=…"
            )


def of_checkpoint(path: Path, meta: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the formulation of a checkpoint's weights, from its metadata, or from the config of its run if it is old.

    Empty if neither says it.
    """
    if "formulation" in meta:
        return meta["formulation"]
    try:
        text = patiently((path.parents[1] / "config.yaml").read_bytes).decode()
        stored = OmegaConf.to_container(OmegaConf.create(text))
    except (OSError, ValueError, IndexError, YAMLError) as error:
        require_sound_disk(error)
        return {}
    return {key: stored[key] for key in ("diffusion", "lora") if key in stored} if isinstance(stored, dict) else {}
