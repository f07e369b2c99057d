"""Finds the stages that several points share: those whose result depends on the same settings, all the way back.

The rows of `trainer.stages` say which settings decide what a stage learns or makes. A setting that differs within the
sweep and that no row names, such as `parallel.precision`, counts for all trained stages: nobody says that it changes
nothing.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from launch.pipeline import shared_latents
from trainer.recipes.schema import Config
from trainer.recipes.values import flatten, hash_values
from trainer.stages import STAGES, decided_by, stage_before


def touches(swept: str, key: str) -> bool:
    """Whether a swept key changes the value of a key of `flatten`: a section or an entry of a table does too."""
    return key == swept or key.startswith(f"{swept}.") or swept.startswith(f"{key}.")


def decides(key: str, stage: str) -> bool:
    """Whether a setting decides what a stage learns or makes, its length included."""
    return decided_by(key, STAGES[stage].learned_keys())


def is_named_by_a_row(key: str) -> bool:
    """Whether the row of any stage names a setting as one that decides what it learns or makes."""
    return any(decided_by(key, (*row.learned_from, row.name)) for row in STAGES.values())


def own_latents(config: Config) -> Path | None:
    """Return where in the run directory its latents lie; None if they lie elsewhere."""
    folder, run = Path(config.data.latents), Path(config.run_dir)
    return folder.relative_to(run) if folder.is_relative_to(run) else None


def made_elsewhere(config: Config) -> bool:
    """Whether the latents exist outside of the run directory, so that neither `synth` nor `prepare` is needed."""
    return own_latents(config) is None and shared_latents(config)


def stages_of(config: Config) -> list[str]:
    """Return the stages that a point has to run or to share, in order."""
    made = made_elsewhere(config)
    return [stage for stage in config.stages if not (made and STAGES[stage].makes_latents)]


def may_be_shared(stage: str) -> bool:
    """Whether points can share a stage: others use what it learns or makes."""
    return STAGES[stage].trained or STAGES[stage].makes_latents


def fingerprints(config: Config, swept: Collection[str]) -> dict[str, str]:
    """Return a hash of everything that the result of each stage depends on, for the stages that may be shared.

    Args:
        config: the config of a point.
        swept: the keys that differ within the sweep.
    """
    flat = flatten(config)
    unnamed = {
        key: value
        for key, value in flat.items()
        if any(touches(name, key) for name in swept) and not is_named_by_a_row(key)
    }
    found = dict[str, str]()
    for stage in filter(may_be_shared, config.stages):
        facts = {key: value for key, value in flat.items() if decides(key, stage)}
        if STAGES[stage].trained:
            facts |= {
                **unnamed,
                "latents": _latents(config, found),
                "before": found.get(stage_before(config, stage) or ""),
            }
        elif "synth" in found:
            facts["synth"] = found["synth"]
        found[stage] = hash_values({"stage": stage, **facts})
    return found


def _latents(config: Config, found: dict[str, str]) -> list[object]:
    """Return what the latents depend on: where they lie, if not in the run directory, and how they are made."""
    made = "" if made_elsewhere(config) else found["prepare"]
    place = "" if own_latents(config) is not None else config.data.latents
    return [place, made, sorted(config.data.mix.items())]


def ancestors(config: Config, stage: str) -> list[str]:
    """Return the stages, of those that may be shared, whose results a stage uses, directly or by way of others."""
    if not STAGES[stage].trained:
        return ["synth"] if stage == "prepare" and "synth" in config.stages else []
    makers = [name for name in stages_of(config) if STAGES[name].makes_latents]
    before = stage_before(config, stage)
    return [*makers, *([*_chain(config, before)] if before else [])]


def _chain(config: Config, stage: str) -> list[str]:
    before = stage_before(config, stage)
    return [*(_chain(config, before) if before else []), stage]
