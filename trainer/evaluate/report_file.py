"""The types of `evaluation.json` and of the files that it is made from, and how they are read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import msgspec

from models.documents import LARGEST_LIST, Natural, Positive, damaged, fits, read_json
from trainer.run_documents import read_optional

_MEND = "remove it and evaluate again, which makes it from the pieces that are done"
_Interval = Annotated[list[float], msgspec.Meta(min_length=2, max_length=2)]
_Rate = Annotated[float, msgspec.Meta(ge=0)] | None


class _System(TypedDict):
    """See `trainer.evaluate.systems.System`."""

    key: str
    title: str
    role: Literal["original", "ceiling", "system", "baseline", "floor"]
    detail: str
    note: str
    payload_kbps: _Rate
    file_kbps: _Rate
    coded_kbps: _Rate
    page: bool
    table: str
    licence: str
    unavailable: str


class _Figure(TypedDict):
    """See `trainer.evaluate.figures.Figure`."""

    key: str
    title: str
    unit: str
    better: Literal["lower", "higher", ""]
    note: str
    digits: Annotated[int, msgspec.Meta(ge=0, le=20)] | None
    chance: NotRequired[float | None]


class _Result(TypedDict):
    """A figure of a system, see `trainer.evaluate.report.results_of`."""

    mean: float | None
    std: float | None
    ci: _Interval | None
    clips: NotRequired[list[float | None]]
    control: NotRequired[float | None]
    best: NotRequired[bool]
    difference: NotRequired[float]
    difference_ci: NotRequired[_Interval]
    significant: NotRequired[bool]


class _Variability(TypedDict):
    decodes: Natural
    systems: list[str]
    figure: _Figure


class _Clip(TypedDict):
    key: str
    caption: str
    seconds: float
    audio: dict[str, list[str]]


class _Speed(TypedDict):
    encode_realtime_factor: float
    decode_realtime_factor: float
    steps: Positive
    device: str


class _Mean(TypedDict):
    """A mean over the page's clips."""

    mean: float
    ci: _Interval | None
    clips: list[float]


class _Point(_Mean):
    """A point of the curve, see `trainer.evaluate.bit_curve.curve_of`."""

    books: Positive
    bits: Positive
    kbps: Annotated[float, msgspec.Meta(ge=0)]
    control: NotRequired[float]


class _Curve(TypedDict):
    z_rank: Natural
    channels: Positive
    clips: Positive
    points: Annotated[list[_Point], msgspec.Meta(min_length=1)]
    lines: dict[str, _Mean]
    identity: str


class _Report(TypedDict):
    recipe: str
    model_hash: str
    created: str
    sample_rate: Positive
    channels: NotRequired[Positive]
    subtitle: str
    systems: list[_System]
    tables: dict[str, str]
    figures: list[_Figure]
    embedding: str
    confidence: float
    results: dict[str, dict[str, _Result]]
    variability: _Variability
    clips: list[_Clip]
    speed: _Speed
    curve: NotRequired[_Curve | None]
    """None if the recipe wants no curve; missing in reports of older versions."""
    identity: str


def read_report(path: Path, identity: str) -> dict[str, Any] | None:
    """Read an `evaluation.json`; None if there is none, or if it is of another evaluation than `identity`.

    Raises:
        ValueError: the file is damaged.
    """
    report = read_optional(path, dict[str, Any], mend=_MEND, most=LARGEST_LIST)
    if report is None or report.get("identity") != identity:
        return None
    _require_sound(report, path)
    return report


def read_whole_report(path: Path) -> dict[str, Any]:
    """Read an `evaluation.json` of any evaluation. Raises ValueError if there is none, or it is damaged."""
    report = read_optional(path, dict[str, Any], mend=_MEND, most=LARGEST_LIST)
    if report is None:
        raise ValueError(
            f"{path} is missing: give the folder that `spresso evaluate` wrote, such as runs/NAME/evaluate"
        )
    _require_sound(report, path)
    return report


def _require_sound(report: dict[str, Any], path: Path) -> None:
    fits(report, _Report, path, mend=_MEND)
    if problem := _contradiction(report):
        raise damaged(path, problem, _MEND)


def require_own_report(folder: Path) -> None:
    """Raise ValueError if the folder holds a report or tables that no evaluation wrote."""
    name = "evaluation.json"
    report = read_optional(folder / name, dict[str, Any], mend=_MEND, most=LARGEST_LIST)
    foreign = [name] if report and "systems" not in report else []
    # Beside pieces the tables are an evaluation's, whose damaged report was removed, as its message says to.
    if not report and not any(folder.glob("pieces/*/*.safetensors")):
        foreign = [path.name for path in sorted(folder.glob("table.*")) if path.suffix in (".txt", ".md", ".tex")]
    if foreign:
        raise ValueError(
            f"{folder / foreign[0]} was not written by `spresso evaluate`, which would replace it: move it away, or "
            "set another run_dir=…"
        )


def recording(root: Path, source: str) -> Path:
    """Return the path of a recording that a report names, in the folder `root` of its evaluation.

    Raises:
        ValueError: links lead from there out of the folder, so that it is no recording of the evaluation.
    """
    path = root / source
    if not path.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"{path} leads out of {root} to {path.resolve()}: remove it and evaluate again")
    return path


def _contradiction(report: Mapping[str, Any]) -> str:
    """Return which parts of a report do not fit each other; empty if all do."""
    keys = [system["key"] for system in report["systems"]]
    if len(set(keys)) < len(keys):
        return "two of its systems have the same key"
    if unknown := {*report["results"], *report["variability"]["systems"]} - set(keys):
        return f"it has results of {min(unknown)}, but no such system"
    for clip in report["clips"]:
        if unknown := clip["audio"].keys() - set(keys):
            return f"it has audio of {min(unknown)}, but no such system"
        paths = [PurePath(file) for files in clip["audio"].values() for file in files]
        if strange := next((path for path in paths if path.is_absolute() or ".." in path.parts), None):
            return f"{strange} is not in its folder"
    return ""


def read_speed(path: Path) -> dict[str, Any]:
    """Read the measured speed of a codec. Raises ValueError if the file is damaged, OSError if there is none."""
    return dict(read_json(path, _Speed, mend="remove it and evaluate again"))
