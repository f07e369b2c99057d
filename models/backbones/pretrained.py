"""Pretrained models: our own exports and public releases; the one place to load and save weights from."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from models.autoencoder import AudioAE, SpectralAE, VocosAE
from models.backbones.oobleck import OobleckAE, load_oobleck, read_oobleck_config
from models.backbones.released import is_hub_name, locate, missing
from models.backbones.stable_audio import load_stable_audio, read_stable_audio_config
from models.backbones.woosh import autoencoder_from_woosh, dit_from_woosh, load_woosh_folder, read_woosh_sizes
from models.decoder import Decoder, make_decoder
from models.dit import DiT
from models.sizes import DecoderConfig, DiTConfig, VocosConfig, decoder_config
from models.weights import filled, hash_state, load_weights, open_weights, save_weights

__all__ = [
    "AUTOENCODERS",
    "autoencoder_from_woosh",
    "dit_from_woosh",
    "hash_state",
    "latent_timing",
    "load_autoencoder",
    "load_dit",
    "load_weights",
    "load_woosh_folder",
    "locate",
    "missing",
    "outline_autoencoder",
    "read_dit_config",
    "save_weights",
    "weight_files",
]

AUTOENCODERS = ("spectral", "woosh", "oobleck")
"""Kinds of AudioAE."""

Model = TypeVar("Model", bound=nn.Module)
Sizes = TypeVar("Sizes", DiTConfig, VocosConfig)


def load_dit(path: str | Path) -> Decoder:
    """D from an export of ours (a file, or a folder with `dit.safetensors`) or from a release's folder or hub name.

    Raises:
        ValueError: nothing of the kind lies there, or it is damaged or does not fit; names the file.

    Its attribute `diffusion` says in which formulation it was trained: {"name", "options"}; None: not known.
    """
    path = _found(path)
    exported = path / "dit.safetensors" if path.is_dir() else path
    if path.is_dir() and not exported.exists():
        if _in_diffusers_layout(path):
            return load_stable_audio(path)
        released = _of_kind(DiT, load_woosh_folder(path), path)
        released.diffusion = {"name": "flow_matching", "options": {}}
        return released
    config, stored = open_weights(exported)
    diffusion = config.pop("diffusion", None)
    try:
        sizes = decoder_config(config)
        dit = filled(lambda: make_decoder(sizes), stored, str(exported))
        dit.diffusion = diffusion
        return dit
    except TypeError as error:
        raise ValueError(f"{exported} is no DiT's export ({error})") from error


def _found(path: str | Path) -> Path:
    """What `locate` finds; raises ValueError where that is nothing and looks like a name of the hub."""
    found = locate(path)
    if not found.exists() and is_hub_name(path) and found.suffix != ".safetensors":
        raise ValueError(missing(path))
    return found


def _in_diffusers_layout(folder: Path) -> bool:
    return (folder / "transformer").is_dir() or (folder / "model_index.json").is_file()


def weight_files(path: str | Path) -> dict[str, Path]:
    """The files of a D that is a folder, by their names in it: all that `load_dit` may read."""
    folder = locate(path)
    parts = ("transformer", "projection_model", "scheduler") if _in_diffusers_layout(folder) else (".",)
    files = [file for part in parts for file in (folder / part).iterdir() if file.is_file()]
    return {file.relative_to(folder).as_posix(): file for file in files}


def load_autoencoder(kind: str = "spectral", folder: str | Path | None = None) -> AudioAE:
    """The AudioAE of a kind: `spectral`, which needs no folder, `woosh` from the folder of a Woosh-AE release, or
    `oobleck` from Stable Audio Open's, which may be its name on the hub."""
    if kind == "spectral":
        return SpectralAE()
    where = _release_of(kind, folder)
    return load_oobleck(where) if kind == "oobleck" else _of_kind(VocosAE, load_woosh_folder(where), where)


def _release_of(kind: str, folder: str | Path | None) -> Path:
    if kind not in AUTOENCODERS:
        raise ValueError(f"there is no autoencoder of kind {kind!r}: take one of {', '.join(AUTOENCODERS)}")
    if folder is None:
        raise ValueError(f"the autoencoder of kind {kind!r} needs the folder of its release, with config and weights")
    return _found(folder) if kind == "oobleck" else Path(folder)


def latent_timing(kind: str = "spectral", folder: str | Path | None = None) -> tuple[int, int]:
    """Sample rate and hop of an AudioAE, from the release's config alone; raises as `load_autoencoder` does."""
    if kind == "spectral":
        return SpectralAE.sample_rate, SpectralAE.hop
    where = _release_of(kind, folder)
    sizes = read_oobleck_config(where) if kind == "oobleck" else _sizes_of_kind(VocosConfig, where)
    return sizes.sample_rate, sizes.hop


def read_dit_config(path: str | Path) -> DecoderConfig:
    """The sizes of what `load_dit` would load, without reading its weights; raises as that does."""
    path = _found(path)
    exported = path / "dit.safetensors" if path.is_dir() else path
    if path.is_dir() and not exported.exists():
        return read_stable_audio_config(path) if _in_diffusers_layout(path) else _sizes_of_kind(DiTConfig, path)
    config = open_weights(exported)[0]
    config.pop("diffusion", None)
    try:
        return decoder_config(config)
    except TypeError as error:
        raise ValueError(f"{exported} is no DiT's export ({error})") from error


def outline_autoencoder(kind: str = "spectral", folder: str | Path | None = None) -> AudioAE:
    """What `load_autoencoder` would load, on the meta device: all shapes and no numbers."""
    if kind == "spectral" or folder is None:
        with torch.device("meta"):
            return SpectralAE()
    where = _release_of(kind, folder)
    if kind == "oobleck":
        sizes = read_oobleck_config(where)
        with torch.device("meta"):
            return OobleckAE(sizes)
    with torch.device("meta"):
        return VocosAE(_sizes_of_kind(VocosConfig, where))


def _sizes_of_kind(kind: type[Sizes], folder: str | Path) -> Sizes:
    sizes = read_woosh_sizes(folder)
    if not isinstance(sizes, kind):
        raise ValueError(f"{folder} holds the other model of the release: give its other folder")
    return sizes


def _of_kind(kind: type[Model], model: nn.Module, folder: str | Path) -> Model:
    if not isinstance(model, kind):
        raise ValueError(
            f"{folder} holds a {type(model).__name__}, not a {kind.__name__}: give the other folder of the release"
        )
    return model
