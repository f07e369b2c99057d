"""Plans a sweep: its points with their configs, what exists of them, and the stages that they share.

A point is its settings. Points of an earlier command keep their names and the places of their stages, whatever values
or keys are added later.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.pipeline import require_settings_of_all_stages
from launch.sweep import record as records
from launch.sweep import sharing
from launch.sweep.names import name_of
from launch.sweep.points import Wanted, first_settings, wanted
from launch.sweep.points_file import Settings
from launch.sweep.record import Record, RecordedPoint
from launch.sweep.same_base import require_same_base
from trainer.recipes.reading import load_recipe
from trainer.recipes.schema import Config
from trainer.recipes.values import flatten, hash_values
from trainer.run_directory import stored_settings
from trainer.stages import STAGES

_SUFFIX = "-sweep"


@dataclass
class SweepPoint:
    """A point that a command asks for."""

    name: str
    settings: Settings
    config: Config
    elsewhere: dict[str, str] = field(default_factory=dict)
    """Stage → the run directory, below the sweep's, in which it lies if not in the point's own."""
    own: list[str] = field(default_factory=list)
    """The stages that the point runs itself, in order."""

    @property
    def recorded(self) -> RecordedPoint:
        """The point as `sweep.json` has it."""
        return RecordedPoint(self.name, self.settings, self.elsewhere)


@dataclass
class SharedStage:
    """A stage that several points use."""

    folder: str
    """The run directory in which it lies, below the sweep's."""
    stage: str
    config: Config
    elsewhere: dict[str, str]
    """The stages that it uses and that lie in other run directories, as those of a `Point`."""
    points: list[str]
    """Names of the points of this command that use it."""
    after: list[tuple[str, str]]
    """The shared stages that must be done before."""

    @property
    def key(self) -> tuple[str, str]:
        """What names the stage in the sweep: its run directory, and the stage."""
        return self.folder, self.stage


@dataclass
class Plan:
    """What a command does in a sweep's directory."""

    folder: Path
    name: str
    recipe: str
    keys: list[str]
    """The keys that differ within the sweep, those of earlier commands included."""
    points: list[SweepPoint]
    shared: list[SharedStage]
    """In an order in which they can be done."""
    before: list[RecordedPoint]
    """Points of earlier commands."""
    at_once: int | None
    """Number of points that run at the same time on SLURM; None: any."""
    repeated: int = 0
    """Points that were left out because their settings are those of another one."""

    @property
    def others(self) -> list[RecordedPoint]:
        """Points of earlier commands that this one does not name. They stay as they are."""
        named = {point.name for point in self.points}
        return [point for point in self.before if point.name not in named]

    @property
    def record(self) -> Record:
        """The sweep as `sweep.json` has it, the new points last."""
        points = {point.name: point for point in self.before} | {point.name: point.recorded for point in self.points}
        return Record(records.FORMAT, self.name, self.recipe, self.keys, list(points.values()), self.at_once)

    def needed_by(self, points: Sequence[SweepPoint]) -> list[SharedStage]:
        """Return the shared stages that some points use."""
        names = {point.name for point in points}
        return [shared for shared in self.shared if names & set(shared.points)]


def make_plan(
    recipe: str, overrides: Sequence[str], *, points: Path | None, folder: Path | None, at_once: int | None = None
) -> Plan:
    """Plan a sweep; nothing is written.

    Args:
        recipe: path or name of the recipe.
        overrides: `key=value` for all points, `key=a,b,c` for a grid.
        points: file with further grids, paired lists and random search.
        folder: the sweep's directory; None: the recipe's `run_dir` with a suffix.
        at_once: number of points that run at the same time on SLURM; None: as in an earlier command.

    Raises:
        ValueError: with a line for every problem of every point.
    """
    try:
        first = load_recipe(recipe, first_settings(overrides, points))
    except ValueError:
        first = None  # all problems of all points are told below
    folder = folder or Path(f"{first.run_dir if first else 'runs/unnamed'}{_SUFFIX}")
    known = records.read(folder) if first else None
    asked = wanted(recipe, overrides, points, swept=known.keys if known else ())
    name = first.name if first else "unnamed"
    found, repeated = _points(asked, folder, name, known)
    require_settings_of_all_stages(found[0].config)
    at_once = known.at_once if known and at_once is None else at_once
    keys = list(dict.fromkeys([*(known.keys if known else []), *asked.keys]))
    require_same_base(asked, folder, keys, {point.name: point.config for point in found}, known)
    plan = Plan(
        folder, name, recipe, keys, found, [], known.points if known else [], at_once, asked.repeated + repeated
    )
    _share(plan, known)

    def load(point: SweepPoint, place: str) -> Config:
        called = f"{name}.{Path(place).name}"
        return _with_own_upload(asked.load(point.settings, folder / place, called), place)

    _settle(plan, load)
    return plan


def recorded_plan(folder: Path) -> Plan:
    """Return the plan of all points of a sweep as its directory has them.

    Raises:
        ValueError: it is no sweep's, or a config in it is damaged or fits no longer.
        OSError: a file is missing or can't be read.
    """
    known = records.read(folder)
    if known is None:
        raise ValueError(f"{folder} has no {records.FILE}: give the directory of a sweep")

    def stored(place: str) -> Config:
        config, now = load_recipe(str(folder / place / "config.yaml"), []), folder / place
        if Path(config.run_dir).resolve() != now.resolve():  # the directory has moved
            latents = sharing.own_latents(config)
            config.run_dir = str(now)
            config.data.latents = config.data.latents if latents is None else str(now / latents)
        return config

    points = [
        SweepPoint(point.name, point.settings, stored(point.folder), dict(point.stages)) for point in known.points
    ]
    plan = Plan(folder, known.name, known.recipe, known.keys, points, [], known.points, known.at_once)
    _settle(plan, lambda _, place: stored(place))
    return plan


def _points(asked: Wanted, folder: Path, name: str, known: Record | None) -> tuple[list[SweepPoint], int]:
    """Return the points with their configs, and how many were left out because they are the same as another.

    Raises ValueError with all problems of all points.
    """
    all_ = KnownPoints(_recorded_values(folder, known), asked.keys)
    problems: dict[str, list[str]] = {}
    found: dict[str, SweepPoint] = {}
    repeated = 0
    for settings in asked.points:
        try:
            point = _point(asked, folder, name, settings, all_)
        except ValueError as error:
            for line in str(error).splitlines():
                problems.setdefault(line, []).append(name_of(settings))
            continue
        repeated += point.name in found
        found.setdefault(point.name, point)
        all_.add(point.name, point.settings, flatten(point.config))
    if problems:
        raise ValueError("\n".join(_told(line, names, len(asked.points)) for line, names in problems.items()))
    _require_own_files([point.config for point in found.values()])
    return list(found.values()), repeated


def _point(asked: Wanted, folder: Path, name: str, settings: Settings, known: KnownPoints) -> SweepPoint:
    """Return a point, under the name of the `known` one with the same settings or under a new one."""

    def load(called: str) -> Config:
        config = asked.load(settings, folder / records.POINTS / called, f"{name}.{called}")
        return _with_own_upload(config, f"{records.POINTS}/{called}")

    first = name_of(settings)
    config = load(first)
    same = known.same(settings, flatten(config))
    called = same or name_of(settings, known.typed)
    # a recorded point keeps its text, so that its name stays that of its settings
    typed = known.typed[same] if same else settings
    return SweepPoint(called, typed, config if called == first else load(called))


class KnownPoints:
    """The points that there are, and which of them has some values; hundreds are found without comparing each two."""

    def __init__(self, recorded: Mapping[str, tuple[Settings, dict[str, Any]]], keys: Iterable[str]) -> None:
        """Begin with the recorded points; `keys`: those that differ, beside the recorded points' own."""
        self.typed: dict[str, Settings] = {}
        """The settings of each point as they were typed."""
        self._keys = sorted({*keys, *(key for typed, _ in recorded.values() for key in typed)})
        self._names: dict[str, str] = {}
        for name, (typed, flat) in recorded.items():
            self.add(name, typed, flat)

    def add(self, name: str, typed: Settings, flat: Mapping[str, Any]) -> None:
        """Add a point, unless it is known; `flat`: its config's values."""
        self.typed.setdefault(name, typed)
        self._names.setdefault(self._values(typed, flat), name)

    def same(self, typed: Settings, flat: Mapping[str, Any]) -> str | None:
        """Return the name of the first point with the same values for all keys that differ; None if there is none."""
        return self._names.get(self._values(typed, flat))

    def _values(self, typed: Settings, flat: Mapping[str, Any]) -> str:
        """Return a hash of the values of the keys that differ."""
        found: dict[str, Any] = {}
        for swept in self._keys:
            touched = {key: _plain(value) for key, value in flat.items() if sharing.touches(swept, key)}
            # the name of a file with settings, such as `model`, touches no key
            found[swept] = touched or typed.get(swept)
        return hash_values(found)


def _plain(value: Any) -> Any:
    """Return 1 for 1.0: the two are one value of a setting."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _recorded_values(folder: Path, known: Record | None) -> dict[str, tuple[Settings, dict[str, Any]]]:
    """Return the settings of the recorded points, as typed and as values; one without a directory is left out."""
    found = {}
    for point in known.points if known else ():
        try:
            found[point.name] = (point.settings, stored_settings(folder / point.folder))
        except FileNotFoundError:
            continue
    return found


def _told(line: str, names: Sequence[str], count: int) -> str:
    """Return a problem with the points that have it; without, if all have it."""
    if len(names) == count > 1:
        return line
    return f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {line}"


def _with_own_upload(config: Config, below: str) -> Config:
    """Give each run directory of a sweep a folder of its own on a store."""
    if config.checkpoint.upload is not None:
        config.checkpoint.upload = f"{config.checkpoint.upload.rstrip('/')}/{below}"
    return config


def _require_own_files(configs: Sequence[Config]) -> None:
    """Raise ValueError if several points would write one file or folder with different content."""
    files = Counter(config.log.prometheus for config in configs if config.log.prometheus is not None)
    if twice := [file for file, count in files.items() if count > 1]:
        raise ValueError(f"log.prometheus={twice[0]} is one file for several points: put ${{name}} into it")
    made: dict[str, str] = {}
    for config in configs:
        if sharing.own_latents(config) is None and not sharing.made_elsewhere(config):
            how = sharing.fingerprints(config, ())["prepare"]
            if made.setdefault(config.data.latents, how) != how:
                raise ValueError(
                    f"data.latents={config.data.latents} is one folder, but the points prepare different latents: "
                    f"leave data.latents out, and each kind of latents gets a folder of its own"
                )


# --- what is shared ---------------------------------------------------------------------------------------------------


def _share(plan: Plan, known: Record | None) -> None:
    """Set for each point where the stages lie that it shares."""
    prints = {point.name: sharing.fingerprints(point.config, plan.keys) for point in plan.points}
    places = _recorded_places(plan, known, prints)
    counts = Counter(print_ for each in prints.values() for print_ in each.values())
    for point in plan.points:
        own = f"{records.POINTS}/{point.name}"
        for stage in filter(sharing.may_be_shared, sharing.stages_of(point.config)):
            print_ = prints[point.name][stage]
            if counts[print_] > 1 or print_ in places:
                places.setdefault(print_, f"{records.SHARED}/{stage}-{print_[:8]}")
            if (place := places.get(print_, own)) != own:
                point.elsewhere[stage] = place


def _settle(plan: Plan, load: Callable[[SweepPoint, str], Config]) -> None:
    """Set the shared stages of a plan, and which stages each point runs itself, from where the points' stages lie.

    `load` returns the config of a run directory of shared stages, for one of the points that use it.
    """
    users = _users(plan)
    found = [_shared_stage(plan, load, folder, stage, using) for (folder, stage), using in users.items()]
    plan.shared = sorted(found, key=lambda shared: (list(STAGES).index(shared.stage), shared.folder))
    for point in plan.points:
        own = f"{records.POINTS}/{point.name}"
        ours = [stage for stage in sharing.stages_of(point.config) if stage not in point.elsewhere]
        point.own = [stage for stage in ours if (own, stage) not in users]


def _recorded_places(plan: Plan, known: Record | None, prints: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Return where the stages of the recorded points lie, by their fingerprints."""
    places = dict[str, str]()
    for point in known.points if known else ():
        if (each := prints.get(point.name)) is None:
            try:
                config = load_recipe(str(plan.folder / point.folder / "config.yaml"), [])
            except ValueError:  # it can't be run again, so nothing is taken from it
                continue
            each = sharing.fingerprints(config, plan.keys)
        for stage, print_ in each.items():
            places.setdefault(print_, point.folder_of(stage))
    return places


def _users(plan: Plan) -> dict[tuple[str, str], list[SweepPoint]]:
    """Return the points that use each shared stage, the point in whose directory it lies included."""
    users: dict[tuple[str, str], list[SweepPoint]] = {}
    for point in plan.points:
        for stage, folder in point.elsewhere.items():
            users.setdefault((folder, stage), []).append(point)
    for point in plan.points:
        for stage in sharing.stages_of(point.config):
            if using := users.get((f"{records.POINTS}/{point.name}", stage)):
                using.insert(0, point)
    return users


def _shared_stage(
    plan: Plan, load: Callable[[SweepPoint, str], Config], folder: str, stage: str, using: Sequence[SweepPoint]
) -> SharedStage:
    """Return a shared stage that some points use, the one in whose directory it lies first."""
    first = using[0]
    own = f"{records.POINTS}/{first.name}"
    config = first.config if folder == own else load(first, folder)
    before = sharing.ancestors(config, stage)
    places = {name: first.elsewhere.get(name, own) for name in before}
    elsewhere = {name: place for name, place in places.items() if place != folder}
    after = [(place, name) for name, place in places.items()]
    return SharedStage(folder, stage, config, elsewhere, [point.name for point in using], after)
