"""Refuses settings of all points that would change what the points of an earlier command learn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.sweep import sharing
from launch.sweep.points import Wanted
from launch.sweep.record import Record
from trainer.file_names import printable
from trainer.recipes.schema import Config
from trainer.recipes.values import flatten
from trainer.run_directory import stored_settings
from trainer.stages import STAGES, trained_stages

_SHOWN = 4


def require_same_base(
    asked: Wanted, folder: Path, keys: Sequence[str], configs: Mapping[str, Config], known: Record | None
) -> None:
    """Raise ValueError if a recorded point would learn something else with the settings that are given now.

    Args:
        asked: what the command asks for.
        folder: the sweep's directory.
        keys: the keys that differ within the sweep.
        configs: the configs of the points that the command names, by the points' names.
        known: the record of the sweep, if there is one.
    """
    others_checked = False
    for point in known.points if known else ():
        path = folder / point.folder
        if not (path / "config.yaml").exists() or not _has_begun(path):
            continue
        if (now := configs.get(point.name)) is None:
            if others_checked:  # all points have the same settings but for the keys that differ
                continue
            others_checked = True
            typed = {key: value for key, value in point.settings.items() if not _is_given(asked, key)}
            now = asked.load(typed, path, point.name)
        if found := _differences(stored_settings(path), now, keys):
            told = "; ".join(f"{key} ({_shown(before)} → {_shown(value)})" for key, before, value in found[:_SHOWN])
            key, before, value = found[0]
            raise ValueError(
                f"{folder} was begun with other settings: {told}{'; …' if len(found) > _SHOWN else ''}: set "
                f"{key}={_shown(before)} as before, let it differ with {key}={_shown(before)},{_shown(value)}, or take "
                f"another --dir"
            )


def has_same_results(folder: Path, config: Config) -> bool:
    """Whether a run directory's own config leads to the same results and figures. Raises ValueError, OSError."""
    stored = stored_settings(folder)
    return all(
        stored.get(key) == value or _is_same_place(stored.get(key), value)
        for key, value in flatten(config).items()
        if any(sharing.decides(key, stage) for stage in config.stages)
    )


def _has_begun(folder: Path) -> bool:
    """Whether a point was submitted, or a stage that it uses has begun to train: before, its settings may change."""
    return (folder / "jobs.jsonl").exists() or any(
        (folder / name / "config.yaml").exists() for name in trained_stages()
    )


def _is_given(asked: Wanted, key: str) -> bool:
    return any(override.partition("=")[0] == key for override in asked.overrides)


def _differences(stored: Mapping[str, Any], config: Config, keys: Sequence[str]) -> list[tuple[str, Any, Any]]:
    """Return the settings that decide what a stage learns and that differ: key, value before, value now."""
    made = sharing.made_elsewhere(config)
    stages = [stage for stage in config.stages if stage in STAGES and sharing.may_be_shared(stage)]
    stages = [stage for stage in stages if not (made and STAGES[stage].makes_latents)]
    return [
        (key, stored.get(key), value)
        for key, value in flatten(config).items()
        if stored.get(key) != value
        and not any(sharing.touches(swept, key) for swept in keys)
        and any(sharing.decides(key, stage) for stage in stages)
        and not _is_same_place(stored.get(key), value)
    ]


def _is_same_place(before: object, now: object) -> bool:
    return isinstance(before, str) and isinstance(now, str) and Path(before).resolve() == Path(now).resolve()


def _shown(value: object) -> str:
    return "null" if value is None else printable(str(value))
