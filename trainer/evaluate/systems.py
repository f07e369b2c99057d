"""The description of a system in tables and page, and the ranges of bit rates within which systems are compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

EvaluationReport = Mapping[str, Any]
"""The contents of `evaluation.json`."""

_LOW_KBPS = 0.5  # rates from here on are "low", rates below are "ultra-low", as on the paper's page


@dataclasses.dataclass(frozen=True)
class RateRange:
    """A range of bit rates within which systems are compared. Each range has its own table."""

    key: str
    title: str
    lead: str
    """One sentence that says what the table contains."""


RATE_RANGES = {
    each.key: each
    for each in (
        RateRange(
            "continuous",
            "Continuous",
            "These latents are not quantized: the decodes show what z can carry at each latent rate.",
        ),
        RateRange("low", "Low rates", f"These are complete bitstreams of {_LOW_KBPS:g} kbit/s or more."),
        RateRange("ultra_low", "Ultra-low rates", f"These are complete bitstreams below {_LOW_KBPS:g} kbit/s."),
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
    """Measured from the streams' sizes, with headers."""
    coded_kbps: float | None = None
    """Rate of the payload after entropy coding by the codec's prior."""
    page: bool = True
    """Whether the page plays the system; if not, only the tables show it."""
    table: str = ""
    """A key of `RATE_RANGES`; empty for systems that stand in every table: original, ceiling and floors."""
    licence: str = ""
    """The licence of a codec by others."""
    unavailable: str = ""
    """Why there are no figures of the system; empty if there are figures."""


def rate_range_of(kbps: float | None) -> str:
    """Return the key of the range that a payload rate belongs to; None or 0 means continuous."""
    if not kbps:
        return "continuous"
    return "low" if kbps >= _LOW_KBPS else "ultra_low"
