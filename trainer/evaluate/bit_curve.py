"""What a bit is worth: log-mel against bits a vector over prefixes of the codes, and how many directions z uses."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from trainer.effective_rank import covariance, effective_rank
from trainer.evaluate.bootstrap import Numbers, interval, mean_replicates
from trainer.evaluate.figures import log_mel_distance, sounding_channels
from trainer.evaluate.own_codecs import Export, OwnCodec
from trainer.evaluate.pieces import Piece
from trainer.evaluate.report import Gathered
from trainer.evaluate.systems import System
from trainer.evaluate.under_test import SystemUnderTest
from trainer.recipes.schema import Config
from trainer.recipes.values import hash_values

_FIGURE = "log_mel"
_LINES = ("z", "autoencoder", "z_other")
"""Systems that do not depend on the number of bits, for comparison."""


class Probe(ABC):
    """A measurement of a codec that is no system of the tables. It is made block by block, as the systems are."""

    def __init__(self, key: str, export: Export, **facts: object) -> None:
        """`facts` are what the measurement depends on, apart from the model, the sampling and the clips."""
        self.key, self.export = key, export
        sampling = dataclasses.asdict(export.asked) if export.asked else None
        self.identity = hash_values({"model": export.model_hash, "sampling": sampling, **facts})

    @abstractmethod
    def measure(self, rows: Sequence[int]) -> Piece:
        """Measure the clips of a block."""

    def retry(self) -> bool:
        """Probes are of our own codec, which is always available."""
        return False

    def unload(self) -> None:
        """Free the export's weights."""
        self.export.unload()

    def _piece(self, rows: Sequence[int], **found: Any) -> Piece:
        return Piece(dataclasses.asdict(System(self.key, self.key, "system", page=False)), list(rows), **found)


class ZVectors(Probe):
    """Keeps z of all clips, as an embedding of them."""

    def measure(self, rows: Sequence[int]) -> Piece:
        """Encode the clips to z."""
        z_BNZ = self.export.z(rows).transpose(1, 2).float().cpu()
        return self._piece(rows, embedding=z_BNZ.flatten(0, 1), windows=[z_BNZ.shape[1]] * len(z_BNZ))


class Prefix(Probe):
    """The log-mel distance of the page's clips, decoded from their first `books` codes."""

    def __init__(self, export: Export, books: int) -> None:
        super().__init__(f"curve_zq{books}", export, books=books)
        self.books = books

    def measure(self, rows: Sequence[int]) -> Piece:
        """Decode those of the clips that the page plays."""
        clips = self.export.clips
        played = [row for row in rows if row < clips.on_page]
        if not played:
            return self._piece([], figures={_FIGURE: torch.zeros(0, dtype=torch.float64)})
        z_BZN, _ = self.export.through_files(played, self.books)
        pairs = zip(clips.audio(played), self.export.decode(z_BZN, played), strict=True)
        distances = [
            log_mel_distance(one_CS[channels], other_CS[channels], clips.sample_rate).mean()
            for one_CS, other_CS in pairs
            for channels in [sounding_channels(one_CS)]
        ]
        return self._piece(played, figures={_FIGURE: torch.stack(distances).double().cpu()})


def probes_of(config: Config, sources: Sequence[SystemUnderTest]) -> list[Probe]:
    """Return the probes of the finetuned codec. The recipe's own rates are decoded anyhow and need none."""
    if not config.evaluate.curve:
        return []
    export = next(one.export for one in sources if isinstance(one, OwnCodec) and one.key == f"zq{config.rates[0]}")
    books = curve_books(config.quantizer.books, config.rates, most=config.evaluate.curve)
    return [ZVectors("z_vectors", export), *(Prefix(export, m) for m in books if m not in config.rates)]


def curve_books(books: int, rates: Sequence[int], *, most: int) -> list[int]:
    """Choose about `most` of the prefixes 1 … `books`: all if they are so few, else spread geometrically.

    The first, the last and all `rates` are among them.
    """
    if books <= most:
        return list(range(1, books + 1))
    chosen, spread = {1, books, *rates}, most
    while len(chosen) < most:
        chosen |= set(sorted({round(m) for m in np.geomspace(1, books, spread)} - chosen)[: most - len(chosen)])
        spread += 1
    return sorted(chosen)


def curve_of(config: Config, gathered: Mapping[str, Gathered], *, on_page: int) -> dict[str, Any]:
    """Return the report's `curve`, from the results of systems and probes by their keys.

    Returns:
        `z_rank`: directions that hold 99 % of the variance of z over all clips, of `channels`. `points`: for each
        prefix its `books`, `bits` per vector, `kbps`, and over the `clips` of the page the `mean` log-mel distance,
        its `ci` and each clip's value; at the recipe's rates also `control`, the mean of another clip's codes.
        `lines`: the same of the systems that do not depend on the bits.
    """
    z_NZ = torch.cat([gathered["z_vectors"].embedding[row] for row in sorted(gathered["z_vectors"].embedding)])
    of_book, bits = _kbps_of_book(config, gathered), config.quantizer.size.bit_length() - 1
    points = []
    for books in curve_books(config.quantizer.books, config.rates, most=config.evaluate.curve):
        of_rate = books in config.rates
        values_C = gathered[f"zq{books}" if of_rate else f"curve_zq{books}"].figures[_FIGURE][:on_page]
        point = {"books": books, "bits": books * bits, "kbps": of_book * books} | _mean(values_C)
        if of_rate:
            point["control"] = float(np.nanmean(gathered[f"zq{books}_other"].figures[_FIGURE][:on_page]))
        points.append(point)
    return {
        "z_rank": effective_rank(covariance(z_NZ)),
        "channels": z_NZ.shape[1],
        "clips": on_page,
        "points": points,
        "lines": {key: _mean(gathered[key].figures[_FIGURE][:on_page]) for key in _LINES},
    }


def _kbps_of_book(config: Config, gathered: Mapping[str, Gathered]) -> float:
    """Return the exact payload rate of one codebook."""
    rate = config.rates[0]
    return (gathered[f"zq{rate}"].system.payload_kbps or 0.0) / rate


def _mean(values_C: Numbers) -> dict[str, Any]:
    bounds = interval(mean_replicates(values_C))
    return {"mean": float(values_C.mean()), "ci": None if bounds is None else list(bounds), "clips": values_C.tolist()}
