"""A tiny codec and sounds for tests of `spresso encode`, `decode` and `info`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch

from launch.cli import main
from models.backbones.pretrained import load_dit
from models.dit import DiT
from models.prior import Prior
from models.weights import save_weights
from tests.models.test_codec import DIT, make_codec


def export_codec(folder: Path, seed: int = 1) -> Path:
    """Write the export of an untrained codec with a prior; return its folder."""
    torch.manual_seed(seed)
    save_weights(folder / "dit.safetensors", DiT(DIT).state_dict(), dataclasses.asdict(DIT))
    made = make_codec(load_dit(folder / "dit.safetensors"))
    made.prior = Prior(3, 16)
    codes = made.encode(torch.from_numpy(sound(2.0)[:, 0])[None].float()).codes
    made.prior.fit(torch.from_numpy(codes[0]))
    made.save_pretrained(folder / "export", base=folder / "dit.safetensors", card="# A codec, model {model}\n")
    return folder / "export"


def sound(seconds: float, channels: int = 1, rate: int = 48_000, seed: int = 0) -> np.ndarray:
    """Return noise (samples, channels)."""
    return np.random.default_rng(seed).normal(size=(round(seconds * rate), channels)) * 0.1


def spresso(*arguments: object) -> int:
    """Run the command and return its exit status."""
    return main([str(argument) for argument in arguments])


def content(folder: Path) -> dict[str, bytes]:
    """Return the bytes of all files below a folder but records and reports, by relative path."""
    files = (path for path in folder.rglob("*") if path.is_file() or path.is_symlink())
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in files
        if path.name != ".encoded.jsonl" and not path.name.endswith(".report.json")
    }
