"""Turns the pieces into the report: means, intervals, controls, and which differences are significant."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.evaluate import bootstrap
from trainer.evaluate.bootstrap import Numbers, SetReplicates
from trainer.evaluate.figures import Figure, retrieval, set_figures
from trainer.evaluate.pieces import Piece
from trainer.evaluate.scores import SPREAD
from trainer.evaluate.systems import RATE_RANGES, System

_COMPETE = ("system", "baseline")


class Gathered:
    """The results of one system over all clips."""

    def __init__(self, pieces: Sequence[Piece], *, seconds: float, control_of: str) -> None:
        """Gather the pieces of a system, in the order of its blocks; `seconds` is the length of a clip."""
        self.control_of = control_of
        self.rows = [row for piece in pieces for row in piece.rows]
        self.failures = {key: message for piece in pieces for key, message in piece.failures.items()}
        self.audio = {key: files for piece in pieces for key, files in piece.audio.items()}
        self.system = self._described(pieces, seconds)
        self.figures: dict[str, Numbers] = {}
        self.embedding: dict[int, Tensor] = {}
        if self.system.unavailable:
            return
        for key in dict.fromkeys(key for piece in pieces for key in piece.figures):
            parts = [piece.figures[key] for piece in pieces if key in piece.figures]
            self.figures[key] = torch.cat(parts).numpy()
        for piece in pieces:
            windows = piece.embedding.split(piece.windows) if piece.windows else ()
            self.embedding |= {row: part for row, part in zip(piece.rows, windows, strict=False) if len(part)}

    def _described(self, pieces: Sequence[Piece], seconds: float) -> System:
        system = System(**next((piece.system for piece in pieces if piece.unavailable), pieces[0].system))
        rates = (("payload_kbps", "payload_bits", 1), ("file_kbps", "file_bytes", 8), ("coded_kbps", "coded_bits", 1))
        for rate, measured, bits in rates:
            if sizes := [size for piece in pieces for size in getattr(piece, measured)]:
                setattr(system, rate, bits * sum(sizes) / (len(sizes) * seconds) / 1000)
        if self.failures and not system.unavailable:
            first = next(iter(self.failures.values()))
            if len(self.failures) == len(self.rows):
                system.unavailable = first
            else:
                note = f"Failed on {len(self.failures)} of {len(self.rows)} clips: {first}"
                system.note = f"{system.note} {note}".strip()
        return system


def results_of(
    systems: Sequence[Gathered], originals: Mapping[int, Tensor], figures: Sequence[Figure]
) -> dict[str, Any]:
    """Compute the results of the report, by system and figure.

    Args:
        systems: all scored systems, including controls.
        originals: the embedding (windows, dim) of each original, by row.
        figures: the figures of the report.

    Returns:
        For each system and figure: `mean`, `std`, `ci`, the value of each clip (`clips`, None if the clip failed) and
        the mean of the control (`control`). If systems of one table compete, the best one has `best`, and each of the
        others has `difference` to the best, `difference_ci`, and whether the difference is `significant`.
    """
    scored = [one for one in systems if one.system.role != "original" and not one.system.unavailable]
    sets = _Sets(originals)
    replicates: dict[str, dict[str, Numbers]] = {}
    results: dict[str, dict[str, Any]] = {}
    for one in scored:
        _retrieve(one, originals)
        key, hidden = one.system.key, _hidden(one)
        results[key], replicates[key] = {}, {}
        for figure in (*figures, SPREAD):
            if figure.key in one.figures:
                results[key][figure.key] = _of_clips(one.figures[figure.key], replicates[key], figure.key)
        for name, (value, of_set) in sets.figures(one, with_replicates=not hidden).items():
            replicates[key][name] = of_set
            bounds = bootstrap.interval(of_set)
            results[key][name] = {"mean": value, "std": None, "ci": None if bounds is None else list(bounds)}
    for one in scored:
        if one.control_of:
            _set_controls(results[one.control_of], results[one.system.key])
    _compare(scored, results, replicates, figures)
    shown = {one.system.key for one in scored if not _hidden(one)}
    return {key: of_system for key, of_system in results.items() if key in shown}


def _hidden(one: Gathered) -> bool:
    """Whether a system is a control without a row of its own."""
    return bool(one.control_of) and one.system.role != "floor"


def _of_clips(values_C: Numbers, replicates: dict[str, Numbers], key: str) -> dict[str, Any]:
    finite = values_C[np.isfinite(values_C)]
    replicates[key] = bootstrap.mean_replicates(values_C)
    bounds = bootstrap.interval(replicates[key])
    return {
        "mean": float(finite.mean()) if len(finite) else None,
        "std": float(finite.std(ddof=1)) if len(finite) > 1 else None,
        "ci": None if bounds is None else list(bounds),
        "clips": [value if math.isfinite(value) else None for value in values_C.tolist()],
    }


def _retrieve(one: Gathered, originals: Mapping[int, Tensor]) -> None:
    """Add the figure `retrieval` of each clip for which the system has a decode; NaN for the others."""
    places = {row: place for place, row in enumerate(originals)}
    decoded = [row for row in one.rows if row in one.embedding]
    values = dict.fromkeys(one.rows, math.nan)
    if decoded:
        reference = torch.stack([rows.mean(0) for rows in originals.values()])
        estimate = torch.stack([one.embedding[row].mean(0) for row in decoded])
        found = retrieval(reference, estimate, torch.tensor([places[row] for row in decoded]))
        values |= dict(zip(decoded, found.tolist(), strict=True))
    one.figures["retrieval"] = np.array(list(values.values()))


class _Sets:
    """Computes distances between all originals and all decodes of a system, with bootstrap replicates."""

    def __init__(self, originals: Mapping[int, Tensor]) -> None:
        self._originals = originals
        self._of_rows: dict[tuple[int, ...], SetReplicates] = {}

    def figures(self, one: Gathered, *, with_replicates: bool) -> dict[str, tuple[float, Numbers]]:
        """Return value and replicates of each figure, over the clips for which the system has a decode."""
        rows = tuple(sorted(one.embedding))
        reference, estimate = [self._originals[row] for row in rows], [one.embedding[row] for row in rows]
        if sum(map(len, reference)) < 2:
            return {}
        values = set_figures(torch.cat(reference), torch.cat(estimate))
        if not with_replicates:
            return {key: (value, np.empty(0)) for key, value in values.items()}
        if rows not in self._of_rows:
            self._of_rows[rows] = SetReplicates(reference)
        sets = self._of_rows[rows]
        return {
            "frechet": (values["frechet"], sets.frechet(estimate, values["frechet"])),
            "kernel": (values["kernel"], sets.kernel(estimate)),
        }


def _set_controls(results: dict[str, Any], control: Mapping[str, Any]) -> None:
    for key in results:
        if key in control and key != SPREAD.key:
            results[key]["control"] = control[key]["mean"]


def _compare(
    scored: Iterable[Gathered],
    results: dict[str, dict[str, Any]],
    replicates: Mapping[str, Mapping[str, Numbers]],
    figures: Sequence[Figure],
) -> None:
    """Mark the best system of each table, and compare the others with it, figure by figure."""
    for table in RATE_RANGES:
        rivals = [one for one in scored if _competes(one, table)]
        for figure in figures:
            means = {one.system.key: results[one.system.key].get(figure.key, {}).get("mean") for one in rivals}
            known = {key: mean for key, mean in means.items() if mean is not None}
            if len(known) < 2:
                continue
            best = (min if figure.better == "lower" else max)(known, key=lambda key: known[key])
            results[best][figure.key]["best"] = True
            of_key = {one.system.key: one for one in rivals}
            for key in known.keys() - {best}:
                found = _difference(of_key[key], of_key[best], figure.key, replicates)
                results[key][figure.key] |= found


def _competes(one: Gathered, table: str) -> bool:
    return one.system.table == table and one.system.role in _COMPETE and not one.control_of


def _difference(
    one: Gathered, best: Gathered, figure: str, replicates: Mapping[str, Mapping[str, Numbers]]
) -> dict[str, Any]:
    """Compare a system with the best one, paired over the clips that both have.

    The result is empty for a distance between sets if the two systems do not have the same clips.
    """
    if figure in one.figures:
        difference_C = one.figures[figure] - best.figures[figure]
        value, of_difference = float(np.nanmean(difference_C)), bootstrap.mean_replicates(difference_C)
    else:
        if one.embedding.keys() != best.embedding.keys():
            return {}
        a, b = (replicates[system.system.key][figure] for system in (one, best))
        value, of_difference = float(np.nanmean(a - b)), a - b
    bounds = bootstrap.interval(of_difference)
    if bounds is None:
        return {}
    return {"difference": value, "difference_ci": list(bounds), "significant": bootstrap.excludes_zero(bounds)}


def systems_of(gathered: Sequence[Gathered]) -> list[dict[str, Any]]:
    """Return the systems of the report, without the controls that have no row of their own."""
    return [dataclasses.asdict(one.system) for one in gathered if not _hidden(one)]


def variability(results: Mapping[str, Any], decodes: int) -> dict[str, Any]:
    """Return which systems were decoded several times from the same codes, and the figure of their spread."""
    systems = [key for key, of_system in results.items() if SPREAD.key in of_system]
    return {"decodes": decodes, "systems": systems, "figure": dataclasses.asdict(SPREAD)}
