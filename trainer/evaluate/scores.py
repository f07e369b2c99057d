"""Computes the figures of one system on one block of clips, compared with the originals."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.evaluate.baselines.baseline import resample_mono
from trainer.evaluate.embeddings import Embedding
from trainer.evaluate.figures import FIGURES, Figure, clip_figures, log_mel_distance, sounding_channels
from trainer.evaluate.under_test import Decoded

logger = logging.getLogger(__name__)

SPREAD = Figure(
    key="spread",
    title="Spread of decodes",
    unit="dB",
    better="",
    note="The mean log-mel distance between two decodes of the same codes, over the clips that the page plays. It "
    "shows how much the codes leave undetermined.",
    digits=2,
)
"""Neither a high nor a low spread is better, so `figures_of` does not include it."""
_VISQOL = Figure(
    key="visqol",
    title="ViSQOL",
    unit="MOS-LQO",
    better="higher",
    note="The listeners' rating that a model predicts, from 1 to 5 (audio mode, arXiv 2004.09584). At very low rates "
    "its ranking differs from that of listening tests: it puts DAC above S-PRESSO.",
    digits=2,
)
_VISQOL_RATE = 48_000
_OVER_EMBEDDINGS = ("frechet", "kernel", "retrieval")


def figures_of(embedding: Embedding, *, clips: int, visqol: bool) -> list[Figure]:
    """Return the figures of a report on so many clips, in the order of its tables.

    Figures that are computed from embeddings name the embedding; retrieval says what guessing would reach.
    """
    figures = []
    for figure in FIGURES.values():
        if figure.key in _OVER_EMBEDDINGS:
            figure = dataclasses.replace(
                figure,
                title=f"{figure.title} ({embedding.name})",
                note=f"{figure.note} It is computed over {embedding.note}",
            )
        if figure.key == "retrieval":
            figure = dataclasses.replace(figure, chance=100 / clips)
        figures.append(figure)
    return [*figures, *([_VISQOL] if visqol else [])]


class Scorer:
    """Computes the figures and the embedding of clips."""

    def __init__(self, embedding: Embedding, sample_rate: int, *, visqol: bool) -> None:
        self.embedding, self.sample_rate = embedding, sample_rate
        self._visqol: Any = _load_visqol() if visqol else None

    def figures(self, originals_BCS: Tensor, made: Decoded, rows: Sequence[int]) -> dict[str, Tensor]:
        """Compute the figures of a block.

        Returns:
            float64 (B,) for each key, NaN for clips that failed; `spread` has one value for each clip of several
            decodes.
        """
        each = [
            {key: float("nan") for key in self._keys()}
            if row in made.failures
            else self._of_clip(original_CS, decoded_CS)
            for row, original_CS, decoded_CS in zip(rows, originals_BCS, made.takes[0], strict=True)
        ]
        found = {key: torch.tensor([of_clip[key] for of_clip in each], dtype=torch.float64) for key in self._keys()}
        if made.denoising is not None:
            found["denoising"] = made.denoising.double().cpu()
        if len(made.takes) > 1:
            found["spread"] = spread(made.takes, self.sample_rate)
        return found

    def embed(self, audio_BCS: Tensor) -> tuple[Tensor, list[int]]:
        """Return the embedding rows of all clips, mixed to one channel, and the number of rows of each clip."""
        rows = [self.embedding(audio_1S, self.sample_rate) for audio_1S in audio_BCS.mean(1, keepdim=True)]
        return torch.cat(rows), [len(of_clip) for of_clip in rows]

    def _keys(self) -> list[str]:
        keys = [key for key in FIGURES if key not in (*_OVER_EMBEDDINGS, "denoising")]
        return [*keys, *(["visqol"] if self._visqol is not None else [])]

    def _of_clip(self, original_CS: Tensor, decoded_CS: Tensor) -> dict[str, float]:
        """Average each figure over the channels that are not silent in the original."""
        sounding = sounding_channels(original_CS)
        figures = clip_figures(original_CS[sounding], decoded_CS[sounding], self.sample_rate)
        found = {key: float(values_C.mean()) for key, values_C in figures.items()}
        if self._visqol is not None:
            moses = [self._mos(original_CS[channel], decoded_CS[channel]) for channel in sounding]
            found["visqol"] = sum(moses) / len(moses)
        return found

    def _mos(self, original_S: Tensor, decoded_S: Tensor) -> float:
        pair = (
            resample_mono(audio.cpu().numpy(), self.sample_rate, _VISQOL_RATE).astype(np.float64)
            for audio in (original_S, decoded_S)
        )
        try:
            return float(self._visqol.measure_from_arrays(*pair, _VISQOL_RATE).moslqo)
        except Exception as error:  # the package raises errors of its own, for silence for example
            logger.warning("ViSQOL failed on a clip: %s: %s", type(error).__name__, error)
            return float("nan")


def spread(takes: Sequence[Tensor], sample_rate: int) -> Tensor:
    """Return the mean log-mel distance over all ordered pairs of a clip's decodes: float64 (clips of the last take,).

    `takes` are (clips, channels, samples); the first may hold more clips than the others.
    """
    clips = len(takes[-1])
    pairs = itertools.permutations([take[:clips] for take in takes], 2)
    distances = [log_mel_distance(one, other, sample_rate).mean(1) for one, other in pairs]
    return torch.stack(distances).double().mean(0).cpu()


def _load_visqol() -> Any:
    from visqol import VisqolApi

    api = VisqolApi()
    api.create(mode="audio")
    return api
