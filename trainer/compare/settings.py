"""Which settings of the compared runs differ."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainer.compare.runs import ComparedRun

NOTHING = "–"
_ABOUT_THE_MACHINE = ("name", "run_dir", "log.", "parallel.", "checkpoint.", "cluster.")
"""Keys that change how a run is made, not what it learns. They stand below the others."""


@dataclass(frozen=True)
class Difference:
    """A setting that is not the same in all runs."""

    key: str
    values: tuple[Any, ...]
    """The value in each run; `NOTHING` if the run has no such setting."""

    @property
    def texts(self) -> list[str]:
        """The values as a recipe would have them."""
        return [value if isinstance(value, str) else json.dumps(value) for value in self.values]


def differences(runs: Sequence[ComparedRun]) -> list[Difference]:
    """Return the settings that differ, in the recipe's order; those of machines and logs come last."""
    keys = list(dict.fromkeys(key for run in runs for key in run.settings))
    found = [Difference(key, tuple(run.settings.get(key, NOTHING) for run in runs)) for key in keys]
    differing = [each for each in found if any(value != each.values[0] for value in each.values)]
    return sorted(differing, key=lambda each: each.key.startswith(_ABOUT_THE_MACHINE))
