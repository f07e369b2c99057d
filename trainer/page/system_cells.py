"""The systems of a report, selected by role and by range of bit rates, and the cell that names a system."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.evaluate.systems import RATE_RANGES, EvaluationReport, RateRange, rate_range_of
from trainer.page.html import Html, element, explained, join

SystemEntry = Mapping[str, Any]

ROLES = ("original", "ceiling", "system", "baseline", "floor")
"""Roles in the order of columns and rows."""


def table_key(system: SystemEntry) -> str:
    """Return the key of a system's table, derived from its rate if the report has none; "" if it is in every table."""
    if system["role"] not in ("system", "baseline"):
        return ""
    named = system.get("table")
    return str(named) if named in RATE_RANGES else rate_range_of(system.get("payload_kbps"))


def with_role(report: EvaluationReport, role: str, table: RateRange | None = None) -> list[SystemEntry]:
    """Return the systems of a role, in one table or in all of them, in the report's order."""
    systems = [system for system in report["systems"] if system["role"] == role]
    return [system for system in systems if table is None or table_key(system) in ("", table.key)]


def in_table(report: EvaluationReport, table: RateRange) -> list[SystemEntry]:
    """Return the systems of a table except the original, in the order of roles; none if the table has no codec."""
    if not with_role(report, "system", table) and not with_role(report, "baseline", table):
        return []
    return [system for role in ROLES[1:] for system in with_role(report, role, table)]


def played(report: EvaluationReport) -> set[str]:
    """Return the keys of the systems that have audio; the others are only in the table of figures."""
    return {key for clip in report["clips"] for key, files in clip["audio"].items() if files}


def system_name(system: SystemEntry) -> Html:
    """Return the title with its note, and below them the system's details and licence."""
    lines = [system.get("detail"), system.get("licence")]
    small = [element("small", line) for line in lines if line]
    return join([explained(system["title"], system.get("note")), *small])
