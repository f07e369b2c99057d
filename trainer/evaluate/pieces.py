"""Pieces: the results of one system on one block of clips, each computed once by any process and kept in a file.

A piece is written to a temporary file and renamed. The name of its folder contains a hash of everything that the
figures depend on. A preempted evaluation therefore resumes, another number of parts reuses the same pieces, and a new
baseline costs only its own decodes.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch
from torch import Tensor

from models.documents import Natural, damaged, fits
from models.weights import load_weights, save_weights
from trainer.evaluate.systems import System

_MEND = "remove it and evaluate again"


@dataclasses.dataclass
class Piece:
    """The results of one system on one block. Figures of a clip on which the codec failed are NaN."""

    system: dict[str, Any]
    """The fields of the `System`."""
    rows: list[int]
    """Rows of the block's clips."""
    figures: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    """float64 (clips,) for each key; `spread` has values for the page's clips only."""
    embedding: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(0, 0))
    """float32 (windows, dim), concatenated over the clips."""
    windows: list[int] = dataclasses.field(default_factory=list)
    """How many rows of the embedding each clip has."""
    audio: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    """Audio that the page plays, by the clip's key: one file for each take, relative to the evaluation's folder."""
    payload_bits: list[int] = dataclasses.field(default_factory=list)
    """Measured payload of each clip that did not fail, for codecs by others; empty for continuous latents."""
    file_bytes: list[int] = dataclasses.field(default_factory=list)
    """Size of each clip's stream, with headers, for our own codecs; empty for continuous latents."""
    coded_bits: list[int] = dataclasses.field(default_factory=list)
    """Size of each clip's entropy-coded codes; empty if the codec has no prior."""
    failures: dict[str, str] = dataclasses.field(default_factory=dict)
    """Error messages of a codec by others, by the clip's key."""

    @property
    def unavailable(self) -> str:
        """Why there are no figures; empty if there are figures."""
        return self.system["unavailable"]


class _Facts(TypedDict):
    """The fields of a `Piece` that are not tensors."""

    system: dict[str, Any]
    rows: list[Natural]
    windows: NotRequired[list[Natural]]
    audio: NotRequired[dict[str, list[str]]]
    payload_bits: NotRequired[list[Natural]]
    file_bytes: NotRequired[list[Natural]]
    coded_bits: NotRequired[list[Natural]]
    failures: NotRequired[dict[str, str]]


class Pieces:
    """Reads and writes the pieces of one evaluation, under the evaluation's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def audio(self, name: str) -> Path:
        """Return the folder of a system's audio, relative to the evaluation's; `name` is its key and identity."""
        return Path("audio") / name

    def path(self, name: str, block: int) -> Path:
        """Return the path of a piece."""
        return self.folder / "pieces" / name / f"{block:05d}.safetensors"

    def read(self, name: str, block: int) -> Piece | None:
        """Return a piece, or None if it does not exist yet."""
        try:
            facts, tensors = load_weights(self.path(name, block))
        except FileNotFoundError:
            return None
        path = self.path(name, block)
        fits(facts, _Facts, path, mend=_MEND)
        fits(facts["system"], System, path, mend=_MEND)
        if facts.keys() - _Facts.__annotations__.keys() or "embedding" not in tensors:
            raise damaged(path, "it has other facts than a piece", _MEND)
        embedding = tensors.pop("embedding")
        return Piece(**facts, figures=dict(sorted(tensors.items())), embedding=embedding)

    def write(self, name: str, block: int, piece: Piece) -> None:
        """Write a piece atomically."""
        path = self.path(name, block)
        path.parent.mkdir(parents=True, exist_ok=True)
        facts = {
            item.name: getattr(piece, item.name)
            for item in dataclasses.fields(piece)
            if item.name not in ("figures", "embedding")
        }
        save_weights(path, {**piece.figures, "embedding": piece.embedding}, facts)

    def keep(self, names: set[str]) -> None:
        """Remove the pieces and the audio of other names with a hash, which older evaluations left."""
        for kind in ("pieces", "audio"):
            for path in (self.folder / kind).glob("*/"):
                if path.name not in names and re.fullmatch(r".+-[0-9a-f]{8}", path.name):
                    shutil.rmtree(path, ignore_errors=True)
