"""Counts what becomes of mutants in tests that damage inputs at random.

`python -m pytest --mutants` runs these tests alone and prints a table: dozens of each kind in a few minutes, or
thousands with `-m slow`. The whole suite's slow tests print the table, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import pytest

_PROPERTY = "mutants"


class MutantCounts:
    """How many mutants of each kind were tried, refused in a clear line, and read right."""

    def __init__(self) -> None:
        self.kinds: dict[str, dict[str, int]] = {}

    def begin(self, kind: str) -> None:
        """Count a mutant that is about to be read. If nothing else is counted of it, its reader has failed."""
        self.kinds.setdefault(kind, {"mutants": 0, "refused": 0, "right": 0})["mutants"] += 1

    def end(self, kind: str, *, refused: bool) -> None:
        """Count the outcome of the mutant that was begun."""
        self.kinds[kind]["refused" if refused else "right"] += 1


@pytest.fixture
def mutant_counts(record_property: Callable[[str, object], None]) -> MutantCounts:
    """Counts that are reported with the test, also if it fails."""
    counts = MutantCounts()
    record_property(_PROPERTY, counts.kinds)
    return counts


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--mutants`."""
    parser.addoption("--mutants", action="store_true", help="only the tests that damage inputs at random; with a table")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the tests that count mutants, if they were asked for; of these the slow ones only if they were, too."""
    if not config.option.mutants:
        return
    slow = "slow" in config.option.markexpr
    kept = [
        item
        for item in items
        if "mutant_counts" in getattr(item, "fixturenames", ()) and (slow or not item.get_closest_marker("slow"))
    ]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the table after the slow tests, or after those that `--mutants` chose."""
    if config.option.markexpr != "slow" and not config.option.mutants:
        return
    stats = terminalreporter.stats
    reports = [report for outcome in ("passed", "failed") for report in stats.get(outcome, [])]
    counts = [value for report in reports for name, value in report.user_properties if name == _PROPERTY]
    terminalreporter.write("".join(f"{line}\n" for line in table(counts)))


def table(counts: Iterable[dict[str, dict[str, int]]]) -> Iterator[str]:
    """Yield the lines of a table of all counts, of which several may be of one kind; nothing if there are none."""
    total: dict[str, dict[str, int]] = {}
    for kinds in counts:
        for kind, numbers in kinds.items():
            row = total.setdefault(kind, dict.fromkeys(numbers, 0))
            for name, number in numbers.items():
                row[name] += number
    if total:
        yield f"{'mutants of':36}{'tried':>8}{'refused':>9}{'right':>8}{'failed':>8}"
    for kind, row in sorted(total.items()):
        failed = row["mutants"] - row["refused"] - row["right"]
        yield f"{kind:36}{row['mutants']:8,}{row['refused']:9,}{row['right']:8,}{failed:8,}"
