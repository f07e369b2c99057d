"""Pretrained models: our own exports and the public Woosh release; the one place to load and save weights from."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from torch import nn

from models.autoencoder import AudioAE, SpectralAE, VocosAE
from models.dit import DiT, DiTConfig
from models.weights import filled, hash_state, load_weights, save_weights
from models.woosh import autoencoder_from_woosh, dit_from_woosh, load_woosh_folder

__all__ = [
    "autoencoder_from_woosh",
    "dit_from_woosh",
    "hash_state",
    "load_autoencoder",
    "load_dit",
    "load_weights",
    "load_woosh_folder",
    "save_weights",
]

Model = TypeVar("Model", bound=nn.Module)


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
    config, state = load_weights(exported)
    diffusion = config.pop("diffusion", None)
    try:
        dit = filled(lambda: DiT(DiTConfig(**config)), state, str(exported))
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


def _of_kind(kind: type[Model], model: nn.Module, folder: str | Path) -> Model:
    if not isinstance(model, kind):
        raise ValueError(
            f"{folder} holds a {type(model).__name__}, not a {kind.__name__}: give the other folder of the release"
        )
    return model
