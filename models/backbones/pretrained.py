"""Load pretrained models from this project's exports and from public releases; other packages import from here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from models.autoencoder import AudioAE, SpectralAE, VocosAE
from models.autoencoder_sizes import OobleckConfig, SameConfig, VocosConfig
from models.backbones import stable_audio, stable_audio_3
from models.backbones.oobleck import OobleckAE, load_oobleck, read_oobleck_config
from models.backbones.released import ORIGINAL_CONFIG, class_of
from models.backbones.releases import missing
from models.backbones.same import SameAE, load_same, read_same_config
from models.backbones.stable_audio import load_stable_audio, read_stable_audio_config
from models.backbones.stable_audio_3 import load_stable_audio_3, read_stable_audio_3_config
from models.backbones.woosh import autoencoder_from_woosh, dit_from_woosh, load_woosh_folder, read_woosh_sizes
from models.decoder import Decoder, make_decoder
from models.dit import DiT
from models.documents import fits
from models.hub import is_hub_name, locate
from models.magnitude_autoencoder import MagnitudeAE
from models.sizes import DecoderConfig, DiTConfig, Formulation, decoder_config
from models.stereo_magnitude_autoencoder import StereoMagnitudeAE
from models.weights import Fill, filled, hash_state, load_weights, open_weights, save_weights

__all__ = [
    "AUTOENCODERS",
    "EMBEDDED",
    "autoencoder_from_woosh",
    "dit_from_woosh",
    "hash_state",
    "latent_timing",
    "load_autoencoder",
    "load_dit",
    "load_weights",
    "load_woosh_folder",
    "outline_autoencoder",
    "read_dit_config",
    "save_weights",
    "weight_files",
]

EMBEDDED: dict[str, type[SpectralAE | MagnitudeAE]] = {
    "spectral": SpectralAE,
    "magnitude": MagnitudeAE,
    "magnitude_stereo": StereoMagnitudeAE,
}
"""The kinds of AudioAE that are computed by a formula and need no weights."""


@dataclass(frozen=True)
class InDiffusers:
    """A kind of AudioAE that is read from a release in the layout of diffusers."""

    load: Callable[[str | Path, Fill], AudioAE]
    read_sizes: Callable[[str | Path], OobleckConfig | SameConfig]
    build: Callable[[Any], AudioAE]
    """Builds the AudioAE, without its weights, from its sizes."""


IN_DIFFUSERS = {
    "oobleck": InDiffusers(load_oobleck, read_oobleck_config, OobleckAE),
    "same": InDiffusers(load_same, read_same_config, SameAE),
}
AUTOENCODERS = (*EMBEDDED, "woosh", *IN_DIFFUSERS)
"""The kinds of AudioAE."""

Model = TypeVar("Model", bound=nn.Module)
Sizes = TypeVar("Sizes", DiTConfig, VocosConfig)


def load_dit(path: str | Path, fill: Fill = filled) -> Decoder:
    """Load D from this project's export or from a public release.

    Args:
        path: an exported file, a folder with `dit.safetensors`, or a release's folder or hub name.
        fill: builds the model; `outlined` only checks that the weights fit it.

    Returns:
        D. Its attribute `diffusion` is its training's formulation, {"name", "options"}, or None if unknown.

    Raises:
        ValueError: there is no D at `path`, or it is damaged or does not fit; the message names the file.
    """
    path = _locate(path)
    exported = path / "dit.safetensors" if path.is_dir() else path
    if path.is_dir() and not exported.exists():
        if in_diffusers_layout(path):
            return load_stable_audio_3(path, fill) if _is_stable_audio_3(path) else load_stable_audio(path, fill)
        released = _require_kind(DiT, load_woosh_folder(path, fill), path)
        released.diffusion = {"name": "flow_matching", "options": {}}
        return released
    config, stored = open_weights(exported)
    diffusion = config.pop("diffusion", None)
    sizes = decoder_config(config, exported)
    dit = fill(lambda: make_decoder(sizes), stored, str(exported))
    if diffusion is not None:
        dit.diffusion = dict(fits(diffusion, Formulation, exported, mend="export it again"))
    return dit


def _locate(path: str | Path) -> Path:
    """Return what `locate` finds; raise ValueError if it finds nothing and `path` looks like a hub name."""
    found = locate(path)
    if not found.exists() and is_hub_name(path) and found.suffix != ".safetensors":
        raise ValueError(missing(path))
    return found


def in_diffusers_layout(folder: Path) -> bool:
    """Whether a release's folder has the layout of diffusers."""
    return any((folder / name).exists() for name in ("transformer", "model_index.json", ORIGINAL_CONFIG))


def _is_stable_audio_3(folder: Path) -> bool:
    return class_of(folder, "transformer") == stable_audio_3.CLASS


def weight_files(path: str | Path) -> dict[str, Path]:
    """Return all files that `load_dit` may read from a D's folder, by their relative paths in it."""
    folder = locate(path)
    parts: tuple[str, ...] = (".",)
    if in_diffusers_layout(folder):
        parts = stable_audio_3.PARTS if _is_stable_audio_3(folder) else stable_audio.PARTS
    files = [file for part in parts if (folder / part).is_dir() for file in (folder / part).iterdir() if file.is_file()]
    return {file.relative_to(folder).as_posix(): file for file in files}


def load_autoencoder(kind: str = "spectral", folder: str | Path | None = None, fill: Fill = filled) -> AudioAE:
    """Load an AudioAE.

    Args:
        kind: one of `AUTOENCODERS`.
        folder: the folder of a Woosh-AE release for `woosh`; the folder or the hub name of a release of Stable Audio
            Open for `oobleck` and of Stable Audio 3 for `same`; unused for the kinds of `EMBEDDED`.
        fill: builds the model; `outlined` only checks that the weights fit it.

    Raises:
        ValueError: the kind is unknown, or the folder is missing, damaged or another model's.
    """
    if kind in EMBEDDED:
        return EMBEDDED[kind]()
    where = _require_release(kind, folder)
    if kind in IN_DIFFUSERS:
        return IN_DIFFUSERS[kind].load(where, fill)
    return _require_kind(VocosAE, load_woosh_folder(where, fill), where)


def _require_release(kind: str, folder: str | Path | None) -> Path:
    if kind not in AUTOENCODERS:
        raise ValueError(f"unknown kind of autoencoder {kind!r}: take one of {', '.join(AUTOENCODERS)}")
    if folder is None:
        raise ValueError(f"the autoencoder of kind {kind!r} needs the folder of its release, with config and weights")
    return _locate(folder) if kind in IN_DIFFUSERS else Path(folder)


def latent_timing(kind: str = "spectral", folder: str | Path | None = None) -> tuple[int, int]:
    """Return the sample rate and hop of an AudioAE from its config alone; raises as `load_autoencoder` does."""
    if kind in EMBEDDED:
        return EMBEDDED[kind].sample_rate, EMBEDDED[kind].hop
    where = _require_release(kind, folder)
    sizes: OobleckConfig | SameConfig | VocosConfig
    if kind in IN_DIFFUSERS:
        sizes = IN_DIFFUSERS[kind].read_sizes(where)
    else:
        sizes = _read_woosh_sizes(VocosConfig, where)
    return sizes.sample_rate, sizes.hop


def read_dit_config(path: str | Path) -> DecoderConfig:
    """Return the sizes of the D that `load_dit` would load, without reading its weights; raises as `load_dit` does."""
    path = _locate(path)
    exported = path / "dit.safetensors" if path.is_dir() else path
    if path.is_dir() and not exported.exists():
        if not in_diffusers_layout(path):
            return _read_woosh_sizes(DiTConfig, path)
        return read_stable_audio_3_config(path) if _is_stable_audio_3(path) else read_stable_audio_config(path)
    config = open_weights(exported)[0]
    config.pop("diffusion", None)
    return decoder_config(config, exported)


def outline_autoencoder(kind: str = "spectral", folder: str | Path | None = None) -> AudioAE:
    """Build the AudioAE that `load_autoencoder` would load on the meta device: it has shapes, but no weights."""
    if kind in EMBEDDED or folder is None:
        with torch.device("meta"):
            return EMBEDDED.get(kind, SpectralAE)()
    where = _require_release(kind, folder)
    if kind in IN_DIFFUSERS:
        sizes = IN_DIFFUSERS[kind].read_sizes(where)
        with torch.device("meta"):
            return IN_DIFFUSERS[kind].build(sizes)
    with torch.device("meta"):
        return VocosAE(_read_woosh_sizes(VocosConfig, where))


def _read_woosh_sizes(kind: type[Sizes], folder: str | Path) -> Sizes:
    sizes = read_woosh_sizes(folder)
    if not isinstance(sizes, kind):
        raise ValueError(f"{folder} holds the other model of the release: give the other folder of the release")
    return sizes


def _require_kind(kind: type[Model], model: nn.Module, folder: str | Path) -> Model:
    if not isinstance(model, kind):
        raise ValueError(
            f"{folder} holds a {type(model).__name__}, not a {kind.__name__}: give the other folder of the release"
        )
    return model
