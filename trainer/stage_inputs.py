"""The inputs of a stage: the sets of latents, D's pretrained weights, and the export of the previous stage."""

from __future__ import annotations

from pathlib import Path

from models.backbones.pretrained import weight_files
from trainer.data.shard_set import ShardSet, open_set, open_training_set
from trainer.exported import missing_export
from trainer.files import file_digest
from trainer.recipes.schema import Config
from trainer.recipes.values import hash_values
from trainer.run_directory import RunDirectory, stage_folder
from trainer.stages import STAGES, stage_before


def base_model(config: Config) -> Path:
    """Return the path of D's pretrained weights: a release's folder, or the export of `pretrain`."""
    if config.pretrained.folder is not None:
        return Path(config.pretrained.folder)
    return stage_folder(config, "pretrain") / "export" / "dit.safetensors"


def training_sets(config: Config) -> dict[ShardSet, int]:
    """Open the sets that a run learns from; returns their shares in a batch."""
    folders = config.data.mix or {config.data.latents: 1}
    return {open_training_set(folder, config.data.cache): share for folder, share in folders.items()}


def held_out_set(config: Config) -> ShardSet:
    """Open the held-out set, which no stage learns from."""
    return open_set(f"{config.data.latents.rstrip('/')}/test", config.data.cache)


def stage_inputs(config: Config, stage: str) -> dict[str, str]:
    """Return the hashes of a trained stage's inputs: shards, and the export of the previous stage.

    Raises:
        ValueError: an input is missing. The message names the stage or command that makes it.
    """
    sets = [f"{share} × {shard_set.fingerprint}" for shard_set, share in training_sets(config).items()]
    inputs = {"latents": " + ".join(sets)}
    before = stage_before(config, stage)
    if before is None and STAGES[stage].builds_on:  # Pretrained weights replace the previous stage.
        files = weight_files(base_model(config))
        inputs["pretrained"] = hash_values({name: file_digest(path) for name, path in files.items()})
    elif before is not None:
        inputs[before] = recorded_export(config, before, needed_by=stage)
    return inputs


def recorded_export(config: Config, stage: str, *, needed_by: str) -> str:
    """Return the hash on record of a stage's export, whose files are there.

    Raises:
        ValueError: the stage is not done, or its export is gone.
    """
    directory = RunDirectory(stage_folder(config, stage), stage)
    export = directory.status.get("export")
    if export is None:
        raise ValueError(f"the stage {needed_by} builds on {stage}, which is not done yet: run {stage} first")
    if gone := missing_export(directory.path, directory.status):
        raise ValueError(f"the stage {needed_by} builds on {stage}, but {gone}")
    return export


def require_recorded(config: Config, stage: str, found: str) -> None:
    """Raise ValueError if a stage's export has another hash than the one on record in its `status.json`."""
    directory = RunDirectory(stage_folder(config, stage), stage)
    recorded = directory.status.get("export", found)
    if recorded != found:
        raise ValueError(
            f"{directory.export} has the hash {found[:8]}, but {directory.path / 'status.json'} says that the stage "
            f"exported {recorded[:8]}: the files were damaged or replaced; copy the export again from where it was "
            f"made, or remove the export and run {stage} again, which makes it from its checkpoint"
        )
