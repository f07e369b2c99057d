"""What the table and the page know of a system, and the order in which a table shows them."""

from __future__ import annotations

import dataclasses

LOW_KBPS = 0.5
"""From here up a rate is a low one, below it an ultra-low one: the tables of the paper's page."""
TABLES = {"continuous": "Continuous", "low": "Low rates", "ultra_low": "Ultra-low rates"}


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
    """One of `TABLES`; empty for what belongs to all of them: original, ceiling, floors."""
    licence: str = ""
    """Of a codec by others."""
    unavailable: str = ""
    """Why there are no figures of it; empty where there are."""


def table_of(kbps: float | None) -> str:
    """The table that a codec of this payload belongs to; None: it has no bits."""
    if kbps is None:
        return "continuous"
    return "low" if kbps >= LOW_KBPS else "ultra_low"
