"""What is known of one system on one block of clips: computed once, by whichever process, and kept as a file.

A piece appears by rename. Its folder is named by all that its figures depend on, so that a preempted evaluation goes on
where it was, another number of parts uses the same pieces, and a new baseline costs its own decodes alone.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.weights import load_weights, save_weights


@dataclasses.dataclass
class Piece:
    """One system on one block. Of a clip that its codec failed on, the figures are NaN."""

    system: dict[str, Any]
    """Fields of its `System`."""
    rows: list[int]
    """The block's clips."""
    figures: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    """float64 (clips,) each; `spread` only has those of the page's clips."""
    embedding: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(0, 0))
    """float32 (windows, dim), all clips' one after another."""
    windows: list[int] = dataclasses.field(default_factory=list)
    """How many of them each clip has."""
    audio: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    """By a clip's key, what the page plays: a file a take, relative to the evaluation's folder."""
    payload_bits: list[int] = dataclasses.field(default_factory=list)
    """Of each clip that went through; empty where there are no bits."""
    file_bytes: list[int] = dataclasses.field(default_factory=list)
    """Likewise, with headers."""
    coded_bits: list[int] = dataclasses.field(default_factory=list)
    """Likewise, of the entropy-coded codes; empty where there is no prior."""
    failures: dict[str, str] = dataclasses.field(default_factory=dict)
    """By a clip's key, what a codec by others raised."""

    @property
    def unavailable(self) -> str:
        """Why there are no figures."""
        return self.system["unavailable"]


class Pieces:
    """Those of one evaluation, under its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def audio(self, name: str) -> Path:
        """Folder of a system's sounds, relative to the evaluation's; `name` holds its key and identity."""
        return Path("audio") / name

    def path(self, name: str, block: int) -> Path:
        """Of a piece."""
        return self.folder / "pieces" / name / f"{block:05d}.safetensors"

    def read(self, name: str, block: int) -> Piece | None:
        """A piece, or None where it is not made yet."""
        try:
            facts, tensors = load_weights(self.path(name, block))
        except FileNotFoundError:
            return None
        embedding = tensors.pop("embedding")
        return Piece(**facts, figures=dict(sorted(tensors.items())), embedding=embedding)

    def write(self, name: str, block: int, piece: Piece) -> None:
        """Whole or not at all."""
        path = self.path(name, block)
        path.parent.mkdir(parents=True, exist_ok=True)
        facts = {
            item.name: getattr(piece, item.name)
            for item in dataclasses.fields(piece)
            if item.name not in ("figures", "embedding")
        }
        save_weights(path, {**piece.figures, "embedding": piece.embedding}, facts)

    def keep(self, names: set[str]) -> None:
        """Remove what other evaluations left here."""
        for kind in ("pieces", "audio"):
            for path in (self.folder / kind).glob("*/"):
                if path.name not in names:
                    shutil.rmtree(path, ignore_errors=True)
