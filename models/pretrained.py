"""Pretrained models: our own exports and the public Woosh release; the one place to load and save weights from."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from models.autoencoder import AudioAE, SpectralAE, VocosAE, VocosConfig
from models.dit import DiT, DiTConfig
from models.weights import filled, hash_state, load_weights, open_weights, save_weights
from models.woosh import autoencoder_from_woosh, dit_from_woosh, load_woosh_folder, read_woosh_sizes

__all__ = [
    "autoencoder_from_woosh",
    "dit_from_woosh",
    "hash_state",
    "load_autoencoder",
    "load_dit",
    "load_weights",
    "load_woosh_folder",
    "outline_autoencoder",
    "read_dit_config",
    "save_weights",
]

Model = TypeVar("Model", bound=nn.Module)
Sizes = TypeVar("Sizes", DiTConfig, VocosConfig)


def load_dit(path: str | Path) -> DiT:
    """A DiT from an export of ours (a file, or a folder with `dit.safetensors`) or from a Woosh-Flow release's folder.

    Raises:
        ValueError: nothing of the kind lies there, or it is damaged or does not fit; names the file.

    The DiT's attribute `diffusion` says in which formulation it was trained: {"name", "options"}; None: not known.
    """
    path = Path(path)
    exported = path / "dit.safetensors" if path.is_dir() else path
    if path.is_dir() and not exported.exists():
        released = _of_kind(DiT, load_woosh_folder(path), path)
        released.diffusion = {"name": "flow_matching", "options": {}}
        return released
    config, stored = open_weights(exported)
    diffusion = config.pop("diffusion", None)
    try:
        dit = filled(lambda: DiT(DiTConfig(**config)), stored, str(exported))
        dit.diffusion = diffusion
        return dit
    except TypeError as error:
        raise ValueError(f"{exported} is no DiT's export ({error})") from error


def load_autoencoder(kind: str = "spectral", folder: str | Path | None = None) -> AudioAE:
    """The AudioAE of a kind: `spectral`, which needs no folder, or `woosh` from the folder of a Woosh-AE release."""
    if kind == "spectral":
        return SpectralAE()
    if kind != "woosh":
        raise ValueError(f"there is no autoencoder of kind {kind!r}: take 'spectral' or 'woosh'")
    if folder is None:
        raise ValueError(
            "the autoencoder of kind 'woosh' needs the folder of its release, with config.yaml and weights"
        )
    return _of_kind(VocosAE, load_woosh_folder(folder), folder)


def read_dit_config(path: str | Path) -> DiTConfig:
    """The sizes of what `load_dit` would load, without reading its weights; raises as that does."""
    path = Path(path)
    exported = path / "dit.safetensors" if path.is_dir() else path
    if path.is_dir() and not exported.exists():
        return _sizes_of_kind(DiTConfig, path)
    config = open_weights(exported)[0]
    config.pop("diffusion", None)
    try:
        return DiTConfig(**config)
    except TypeError as error:
        raise ValueError(f"{exported} is no DiT's export ({error})") from error


def outline_autoencoder(kind: str = "spectral", folder: str | Path | None = None) -> AudioAE:
    """What `load_autoencoder` would load, on the meta device: all shapes and no numbers."""
    with torch.device("meta"):
        return VocosAE(_sizes_of_kind(VocosConfig, folder)) if kind == "woosh" and folder else SpectralAE()


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
