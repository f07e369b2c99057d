"""The systems of a report: their parts in the comparison, and the table of rates that each stands in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.evaluate.systems import RATE_RANGES, EvaluationReport, RateRange, rate_range_of
from trainer.page.html import Html, element, explained, join

SystemEntry = Mapping[str, Any]

ROLES = ("original", "ceiling", "system", "baseline", "floor")
"""In the order of columns and rows."""


def table_key(system: SystemEntry) -> str:
    """The key of the system's table, by its rate where the report does not say; "" for bounds, which belong to all."""
    if system["role"] not in ("system", "baseline"):
        return ""
    named = system.get("table")
    return str(named) if named in RATE_RANGES else rate_range_of(system.get("payload_kbps"))


def with_role(report: EvaluationReport, role: str, table: RateRange | None = None) -> list[SystemEntry]:
    """Systems of a role, of one table or of all, in the report's order."""
    systems = [system for system in report["systems"] if system["role"] == role]
    return [system for system in systems if table is None or table_key(system) in ("", table.key)]


def in_table(report: EvaluationReport, table: RateRange) -> list[SystemEntry]:
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
