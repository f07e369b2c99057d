"""The systems of a report: their parts in the comparison, and the table of rates that each stands in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainer.page.html import Html, element, explained, join

EvaluationReport = Mapping[str, Any]
SystemEntry = Mapping[str, Any]

ROLES = ("original", "ceiling", "system", "baseline", "floor")
"""In the order of columns and rows."""
LOW_KBPS = 0.5
"""Bit rates from here on are low, lesser ones ultra-low."""


@dataclass(frozen=True)
class Table:
    """A range of rates within which systems are compared."""

    key: str
    title: str
    lead: str


TABLES = (
    Table("continuous", "Continuous", "Nothing is quantized yet: what the latents can say at each of their rates."),
    Table("low", "Low rates", f"Whole bitstreams, from {LOW_KBPS:g} kbit/s."),
    Table("ultra_low", "Ultra-low rates", f"Whole bitstreams below {LOW_KBPS:g} kbit/s."),
)


def table_key(system: SystemEntry) -> str:
    """The key of the system's table, by its rate where the report does not say; "" for bounds, which belong to all."""
    if system["role"] not in ("system", "baseline"):
        return ""
    named = system.get("table")
    if named in {table.key for table in TABLES}:
        return str(named)
    kbps = system.get("payload_kbps")
    return "continuous" if not kbps else "low" if kbps >= LOW_KBPS else "ultra_low"


def with_role(report: EvaluationReport, role: str, table: Table | None = None) -> list[SystemEntry]:
    """Systems of a role, of one table or of all, in the report's order."""
    systems = [system for system in report["systems"] if system["role"] == role]
    return [system for system in systems if table is None or table_key(system) in ("", table.key)]


def in_table(report: EvaluationReport, table: Table) -> list[SystemEntry]:
    """All that stands in a table beside the original, in the order of roles; nothing where no codec does."""
    if not with_role(report, "system", table) and not with_role(report, "baseline", table):
        return []
    return [system for role in ROLES[1:] for system in with_role(report, role, table)]


def played(report: EvaluationReport) -> set[str]:
    """Keys of the systems of which there is sound; others stand in the table of figures alone."""
    return {key for clip in report["clips"] for key, files in clip["audio"].items() if files}


def system_name(system: SystemEntry) -> Html:
    """The title with its note, and beneath it details and the licence of another's work."""
    lines = [system.get("detail"), system.get("licence")]
    small = [element("small", line) for line in lines if line]
    return join([explained(system["title"], system.get("note")), *small])
