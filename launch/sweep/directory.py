"""Makes a sweep's directory: the run directories with their configs, and the links to shared stages.

A link is relative, so that the whole directory can be moved. Everything that reads a run (`status`, `checkpoint`,
`evaluate` …) finds a shared stage in the run directory of each point.
"""

from __future__ import annotations

import os
from pathlib import Path

from launch.sweep import record as records
from launch.sweep.plan import Plan, SharedStage, SweepPoint
from launch.sweep.same_base import has_same_results
from launch.sweep.sharing import own_latents
from trainer.recipes.schema import Config
from trainer.run_directory import RunDirectory, stage_folder, write_config
from trainer.stages import STAGES


def make(plan: Plan) -> None:
    """Write the record, the config of each run directory, and the links to shared stages.

    Raises:
        ValueError: a file is in the way that no sweep wrote.
        OSError: something can't be written.
    """
    require_free(plan.folder)
    records.write(plan.folder, plan.record)
    parts: list[SweepPoint | SharedStage] = [*plan.shared, *plan.points]
    for part in parts:
        folder = plan.folder / folder_of(part)
        _write_config(folder, part.config)
        for stage, place in part.elsewhere.items():
            if stage == "synth" and "prepare" not in stages_to_run(part):
                continue  # the latents are all that the other stages read
            _link(plan.folder, folder, stage, place, part.config)


def folder_of(part: SweepPoint | SharedStage) -> str:
    """Return the run directory of a point or a shared stage, below the sweep's."""
    return part.folder if isinstance(part, SharedStage) else f"{records.POINTS}/{part.name}"


def require_free(folder: Path) -> None:
    """Raise ValueError if a directory holds files and is no sweep's."""
    ours = (records.FILE, ".owner.json", ".owner.lock")
    if not records.is_sweep(folder) and folder.is_dir():
        foreign = sorted(path.name for path in folder.iterdir() if not path.name.startswith(ours))
        if foreign:
            raise ValueError(
                f"{folder} holds {foreign[0]} and no {records.FILE}, so it is no sweep's: give another --dir"
            )


def is_done(part: SweepPoint | SharedStage) -> bool:
    """Whether everything that a point or a shared stage has to run is done with these settings."""
    return all(_stage_is_done(part.config, stage) for stage in stages_to_run(part))


def stages_to_run(part: SweepPoint | SharedStage) -> list[str]:
    """Return the stages that a point or a shared stage has to run, in order."""
    return [part.stage] if isinstance(part, SharedStage) else part.own


def _stage_is_done(config: Config, stage: str) -> bool:
    if STAGES[stage].trained:
        return RunDirectory(stage_folder(config, stage), stage).done(config)
    if stage == "synth":
        return (stage_folder(config, "audio") / "captions.jsonl").is_file()  # it is written last
    if STAGES[stage].makes_latents:
        return all((Path(config.data.latents) / split / "set.json").is_file() for split in ("train", "test"))
    # The page is written last, after the config with which the point was run.
    folder = Path(config.run_dir)
    written = [folder / "config.yaml", folder / "evaluate" / "evaluation.json", folder / "page" / "index.html"]
    if not all(path.is_file() for path in written) or not has_same_results(folder, config):
        return False
    return written[-1].stat().st_mtime_ns >= written[0].stat().st_mtime_ns


def _write_config(folder: Path, config: Config) -> None:
    """Write the config of a run directory. Its time says from when on figures and pages are those of the config."""
    path = folder / "config.yaml"
    before = path.stat().st_mtime_ns if path.is_file() and has_same_results(folder, config) else None
    write_config(folder, config)
    if before is not None:
        os.utime(path, ns=(before, before))


def _link(sweep: Path, folder: Path, stage: str, place: str, config: Config) -> None:
    """Make a stage of another run directory of the sweep appear in this one, with a link."""
    name = own_latents(config) if stage == "prepare" else Path("audio" if stage == "synth" else stage)
    if name is None:  # the latents have a place of their own
        return
    link, target = folder / name, sweep / place / name
    target.mkdir(parents=True, exist_ok=True)
    link.parent.mkdir(parents=True, exist_ok=True)
    told = os.path.relpath(target, link.parent)
    if link.is_symlink() and str(link.readlink()) == told:
        return
    if link.exists() or link.is_symlink():
        raise ValueError(f"{link} is in the way of the {stage} that {place} shares: move it away")
    link.symlink_to(told, target_is_directory=True)
