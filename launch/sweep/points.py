"""Makes the points of a sweep from the command line and the file: their settings, and their configs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launch.sweep.points_file import Settings, read_points
from launch.sweep.values import split_values
from trainer.recipes.reading import load_recipe
from trainer.recipes.schema import Config

MOST_POINTS = 10_000
_OWN = ("run_dir", "name", "private")
"""Settings that the sweep gives each point itself."""
_OF_THE_WHOLE = ("cluster",)
"""Settings that all points of a sweep share, because they run in one array of jobs."""


@dataclass
class Wanted:
    """What a command asks for."""

    recipe: str
    overrides: list[str] = field(default_factory=list)
    """The settings of all points, as `key=value`."""
    points: list[Settings] = field(default_factory=list)
    """What differs, for each point; all points have the same keys."""
    repeated: int = 0
    """Number of points that were left out because another one has the same text."""

    @property
    def keys(self) -> list[str]:
        """The keys that differ, or may differ."""
        return list(self.points[0]) if self.points else []

    def load(self, settings: Settings, run_dir: Path, name: str) -> Config:
        """Return the config of a point. Raises ValueError with a line for every problem."""
        own = [f"{key}={value}" for key, value in settings.items()]
        return load_recipe(
            self.recipe, [*self.overrides, *own, f"run_dir={_literal(run_dir)}", f"name={_literal(name)}"]
        )


def wanted(recipe: str, overrides: Sequence[str], file: Path | None, *, swept: Iterable[str] = ()) -> Wanted:
    """Read the points that a command asks for.

    Args:
        recipe: path or name of the recipe.
        overrides: `key=value` for all points, or `key=a,b,c` for a grid.
        file: the file of `--points`, if there is one.
        swept: keys that differ in the sweep already. A single value of such a key is that of a further point.

    Raises:
        ValueError: with a line for every problem.
    """
    plain, grid, problems = _from_command(overrides, set(swept))
    read = read_points(file) if file is not None else None
    groups = [*grid, *(read.groups if read else [])]
    problems += [*(read.problems if read else []), *_clashes(groups, plain)]
    if not groups and not problems:
        problems.append("no setting has several values: give one some, such as autoencode.lr=1e-4,3e-4, or --points")
    if (count := math.prod(map(len, groups))) > MOST_POINTS:
        problems.append(f"{count:,} points are more than {MOST_POINTS:,}: give fewer values, or search at random")
    if problems:
        raise ValueError("\n".join(problems))
    points = [{key: value for part in parts for key, value in part.items()} for parts in itertools.product(*groups)]
    single = list({tuple(sorted(point.items())): point for point in points}.values())
    return Wanted(recipe, plain, single, len(points) - len(single))


def first_settings(overrides: Sequence[str], file: Path | None) -> list[str]:
    """Return the settings of the first point as `key=value`, by which the sweep's directory and name are found.

    Raises ValueError if they can't be read.
    """
    first = [f"{key}={split_values(text)[0].strip()}" for key, _, text in (item.partition("=") for item in overrides)]
    groups = read_points(file).groups if file is not None else []
    return [*first, *(f"{key}={value}" for group in groups if group for key, value in group[0].items())]


def _from_command(overrides: Sequence[str], swept: set[str]) -> tuple[list[str], list[list[Settings]], list[str]]:
    """Return the settings of all points, a group for each key with several values, and what is wrong."""
    plain, grid, problems = list[str](), dict[str, list[Settings]](), list[str]()
    for override in overrides:
        key, equals, text = override.partition("=")
        try:
            values = split_values(text) if equals else [text]
        except ValueError as error:
            problems.append(f"{key}: {error}")
            continue
        if key in grid:
            problems.append(f"{key} is given twice: give all its values in one list")
        elif len(values) == 1 and key not in swept:
            plain.append(override)
        else:
            grid[key] = [{key: value.strip()} for value in values]
    return plain, list(grid.values()), problems


def _clashes(groups: Sequence[Sequence[Settings]], plain: Sequence[str]) -> list[str]:
    """Return what is wrong with the keys that differ."""
    keys = [key for group in groups if group for key in group[0]]
    found = [
        f"{key} is given twice: give all its values in one place" for key in dict.fromkeys(keys) if keys.count(key) > 1
    ]
    given = {override.partition("=")[0] for override in plain}
    found += [f"{key} has one value and several: give all its values in one place" for key in keys if key in given]
    for key in keys:
        top = key.partition(".")[0]
        if top in _OWN:
            found.append(f"{key} can't differ: each point gets its own; --dir=FOLDER names the sweep's directory")
        elif top in _OF_THE_WHOLE:
            found.append(f"{key} can't differ: all points of a sweep share it; start a sweep for each")
    return found


def _literal(text: object) -> str:
    """Return text as the value of an override, in which nothing stands for another setting."""
    return str(text).replace("${", r"\${")
