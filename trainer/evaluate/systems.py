"""What tables and page know of a system, and the ranges of bit rates within which systems are compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

EvaluationReport = Mapping[str, Any]
"""What `evaluation.json` holds."""

_LOW_KBPS = 0.5  # from here up a bit rate is low, below it ultra-low, as on the paper's page


@dataclasses.dataclass(frozen=True)
class RateRange:
    """A range of bit rates within which systems are compared: a table of its own."""

    key: str
    title: str
    lead: str
    """What is in the table, in a sentence."""


RATE_RANGES = {
    each.key: each
    for each in (
        RateRange(
            "continuous", "Continuous", "Nothing is quantized yet: what the latents can say at each of their rates."
        ),
        RateRange("low", "Low rates", f"Whole bitstreams, from {_LOW_KBPS:g} kbit/s."),
        RateRange("ultra_low", "Ultra-low rates", f"Whole bitstreams below {_LOW_KBPS:g} kbit/s."),
    )
}


@dataclasses.dataclass
class System:
    """A row of the tables and a column of the page."""

    key: str
    title: str
    role: str
    """`original`, `ceiling`, `system`, `baseline` (a codec by others) or `floor`."""
    detail: str = ""
    note: str = ""
    payload_kbps: float | None = None
    file_kbps: float | None = None
    """With headers."""
    coded_kbps: float | None = None
    """Of the payload when it is entropy-coded by the codec's prior."""
    page: bool = True
    """Whether the page plays it, or only the tables have it."""
    table: str = ""
    """Key of one of `RATE_RANGES`; empty for what belongs to all of them: original, ceiling, floors."""
    licence: str = ""
    """Of a codec by others."""
    unavailable: str = ""
    """Why there are no figures of it; empty where there are."""


def rate_range_of(kbps: float | None) -> str:
    """Key of the range that a codec of this payload belongs to; None and 0: the codec has no bits."""
    if not kbps:
        return "continuous"
    return "low" if kbps >= _LOW_KBPS else "ultra_low"
