"""Embeddings over which sets of clips are compared, and in which the nearest clip is looked for.

Importing this package imports no package that an embedding needs; these are imported when the embedding is used.
"""

from __future__ import annotations

import torch

from trainer.evaluate.embeddings.aisfx import Aisfx
from trainer.evaluate.embeddings.clap import CLAP, Clap
from trainer.evaluate.embeddings.embedding import Embedding
from trainer.evaluate.embeddings.mel_stat import MelStatistics

__all__ = ["Aisfx", "Clap", "Embedding", "MelStatistics", "make_embedding", "problem_of"]


def make_embedding(choice: str, device: torch.device) -> Embedding:
    """Return the embedding of `evaluate.embedding`; nothing is loaded yet.

    Args:
        choice: `aisfx`, `mel-stat`, `clap:` with a folder or a name on the hub, or `auto`: aisfx where it is
            installed, otherwise mel-stat.
        device: where an embedding with weights is computed.
    """
    if choice.startswith(CLAP):
        return Clap(choice.removeprefix(CLAP), device)
    if choice == "aisfx" or (choice == "auto" and not Aisfx.missing()):
        return Aisfx(device)
    return MelStatistics()


def problem_of(choice: str) -> str:
    """Return what is wrong with a recipe's `evaluate.embedding`; empty if nothing is."""
    if choice == "aisfx" and (missing := Aisfx.missing()):
        return f"evaluate.embedding=aisfx: {missing}, or leave the key out"
    if choice in ("auto", "aisfx", "mel-stat") or (choice.startswith(CLAP) and choice != CLAP):
        return ""
    return f"evaluate.embedding={choice} is neither auto, aisfx, mel-stat nor clap:FOLDER_OR_NAME"
