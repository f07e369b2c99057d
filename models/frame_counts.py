"""How many vectors z a sound takes."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from models import export
from models.autoencoder import AudioAE
from models.backbones.pretrained import outline_autoencoder
from models.bitstream import FramesOf
from models.resampling import resampled_samples


def count_z_frames(autoencoder: AudioAE, pooling: int, samples: int, rate: int | None) -> int:
    """Return how many vectors z encode `samples` samples at `rate` (None: the AudioAE's sample rate)."""
    own = autoencoder.sample_rate
    return -(-resampled_samples(samples, rate or own, own) // (autoencoder.hop * pooling))


def read_frames_of(folder: Path) -> FramesOf:
    """Return the `z_frames` function of an export's codec without loading its weights."""
    config = export.read_config(folder)
    return partial(count_z_frames, outline_autoencoder(**config.autoencoder), config.latent_encoder.pooling)
