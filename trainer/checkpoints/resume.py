"""Which checkpoint a run resumes from, and which weights a fresh run starts with.

The run directory's own checkpoints take precedence. A path in `checkpoint.resume` is followed once: a run that is
restarted with the same command resumes from its own newest checkpoint.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from models.disk_errors import with_number
from models.documents import write_json
from models.readable import describe_os_error
from trainer import formulation
from trainer.checkpoints import checkpoint, inventory
from trainer.checkpoints.manifest import OtherFormatError, read_manifest
from trainer.checkpoints.names import MANIFEST, checkpoints, samples_of
from trainer.files import file_digest
from trainer.objectives import Denoiser
from trainer.ranks import collective
from trainer.ranks.flat_ranges import whole_ranges
from trainer.recipes.schema import Config
from trainer.run_directory import RunDirectory, stage_folder
from trainer.run_documents import read_optional
from trainer.stores.layout import located
from trainer.tasks import Task

logger = logging.getLogger(__name__)

_FOLLOWED = "resumed_from.json"


def find_start(config: Config, run: RunDirectory, identities: set[str]) -> Path | None:
    """Find the checkpoint to resume from; None for a fresh run. All ranks.

    Args:
        config: the recipe, whose `checkpoint.resume` is `auto`, `never` or a path.
        run: the stage's run directory.
        identities: the hash of the settings and inputs that the stage learns from, and the same as older versions made
            it. A checkpoint that `checkpoint.resume` names must have one of them.

    Raises:
        ValueError: on every rank, if `checkpoint.resume` cannot be followed, or if there are checkpoints and none of
            them is whole. The message says why and how to fix it.
        OSError: on every rank, if a checkpoint can't be read now.
    """

    def decide() -> tuple[Path | None, str, int | None]:
        try:
            return _decide(config.checkpoint.resume, run, identities), "", None
        except ValueError as error:
            return None, str(error), None
        except OSError as error:
            return None, _unreadable(run, error), error.errno or 0

    path, problem, number = collective.on_rank_0(decide)
    if number is not None:
        raise with_number(number, problem)
    if problem:
        raise ValueError(problem)
    return path


def _unreadable(run: RunDirectory, error: OSError) -> str:
    return (
        f"{describe_os_error(error)}: the checkpoints of {run.path} can't be read now. None was renamed or "
        f"passed over: mend the disk or the permissions, then repeat the command"
    )


def _decide(choice: str, run: RunDirectory, identities: set[str]) -> Path | None:
    """Find the checkpoint to resume from, as `find_start` does. On rank 0."""
    try:
        newest = checkpoint.newest(run.checkpoints)
    except (checkpoint.NoWholeCheckpointError, OtherFormatError) as error:
        if choice == "auto" or (choice != "never" and was_followed(run, choice)):
            raise
        newest = None
        if choice == "never":
            if isinstance(error, OtherFormatError):
                raise
            checkpoint.set_all_aside(run.checkpoints)
    if choice == "auto":
        return newest
    if choice == "never":
        if newest is not None:
            raise ValueError(
                f"{run.path} holds a run at {samples_of(newest)} samples, but checkpoint.resume=never: take "
                f"another run_dir=…, remove {run.path}, or leave out checkpoint.resume to resume that run"
            )
        return None
    if newest is not None and was_followed(run, choice):
        return newest
    path = located(choice, run.path).resolve()
    _require_fit(path, run, identities)
    ours = {other.resolve(): other for other in checkpoints(run.checkpoints)}
    path_here = ours.get(path, path)
    for other in ours.values():
        if path not in ours or samples_of(other) > samples_of(path_here):
            left = other.rename(other.with_name(f"left_{other.name}_{secrets.token_hex(4)}"))
            logger.warning("%s is renamed to %s, because the run resumes from %s", other.name, left.name, path)
    write_json(run.path / _FOLLOWED, {"path": str(path), "manifest": file_digest(path / MANIFEST)})
    return path_here


def require_own_settings(run: RunDirectory, identities: set[str]) -> None:
    """Raise ValueError if a directory that lacks its config.yaml holds a checkpoint of other settings or data.

    With a config.yaml, `RunDirectory.require_same` compares the settings, and names those that differ.

    Raises:
        OSError: a checkpoint can't be read now. The run may not claim the directory with its own config.yaml then,
            because the next start would take that for the config of the checkpoints.
    """
    if (run.path / "config.yaml").exists():
        return
    try:
        others = [path for path in checkpoints(run.checkpoints) if not _may_be_of(path, identities)]
    except OSError as error:
        raise with_number(error.errno, _unreadable(run, error)) from error
    if others:
        raise ValueError(
            f"{others[0]} was trained with other settings or data, and {run.path} has lost its config.yaml: put the "
            f"file back, or set another run_dir=… and checkpoint.start_from={others[0]}, which takes its weights alone"
        )


def _may_be_of(path: Path, identities: set[str]) -> bool:
    """Whether a checkpoint has one of the identities, or is damaged, so that no run resumes from it."""
    try:
        return read_manifest(path)["meta"].get("config") in identities
    except ValueError:
        return True


def was_followed(run: RunDirectory, choice: str) -> bool:
    """Whether the run has resumed from this checkpoint before, which may lie elsewhere now."""
    followed = (
        read_optional(run.path / _FOLLOWED, dict[str, str], mend="remove it to resume from that path again") or {}
    )
    path = located(choice, run.path).resolve()
    if followed.get("path") == str(path):
        return True
    return (path / MANIFEST).is_file() and followed.get("manifest") == file_digest(path / MANIFEST)


def _require_fit(path: Path, run: RunDirectory, identities: set[str]) -> None:
    if problems := checkpoint.find_problems(path):
        raise ValueError(f"checkpoint.resume={path} cannot be loaded: {'; '.join(problems)}")
    meta = read_manifest(path)["meta"]
    if meta.get("stage") != run.stage:
        raise ValueError(
            f"checkpoint.resume={path} is a checkpoint of {meta.get('stage')}, not of {run.stage}: give a checkpoint "
            f"of {run.stage}, or set stage={meta.get('stage')}"
        )
    if meta.get("config") not in identities:
        raise ValueError(
            f"checkpoint.resume={path} was trained with other settings or data: checkpoint.start_from={path} starts a "
            f"new run from its weights alone"
        )


def start(task: Task, location: str) -> None:
    """Load a checkpoint's averaged weights, or those of an export, into a fresh run's task. All ranks.

    Raises:
        ValueError: the location is neither a checkpoint nor an export, or lacks weights that the task trains.
    """
    path = located(location, stage_folder(task.config, task.stage))
    if (path / MANIFEST).exists():
        if problems := collective.on_rank_0(lambda: checkpoint.find_problems(path)):
            raise ValueError(f"checkpoint.start_from={path} cannot be loaded: {'; '.join(problems)}")
        wanted = {f"ema/{name}": value.data for name, value in task.learned.items()}
        wanted |= {f"statistics/{name}": value for name, value in task.statistics.items()}
        meta = collective.on_rank_0(lambda: read_manifest(path)["meta"])
        _require_base(task, path, meta.get("base", ""))
        _require_formulation(task, path, formulation.of_checkpoint(path, meta))
        checkpoint.load(path, whole_ranges(wanted), partly=True)
    elif path.is_dir():
        _copy_export(task, path)
    else:
        raise ValueError(f"checkpoint.start_from={path} is neither a checkpoint nor an export/ folder")
    logger.info("%s: starts with the weights of %s", task.stage, path)


def _require_formulation(task: Task, path: Path, trained: Mapping[str, Any]) -> None:
    if isinstance(task.module, Denoiser):
        has_lora = any(".lora_" in name for name in task.learned)
        formulation.require_same(task.config, trained, f"checkpoint.start_from={path}", lora=has_lora)


@torch.no_grad()
def _copy_export(task: Task, folder: Path) -> None:
    exported, base_hash = task.read_export(folder)
    _require_base(task, folder, base_hash)
    for name, value in {**task.learned, **task.statistics}.items():
        if name not in exported:
            raise ValueError(f"checkpoint.start_from={folder} has no {name}, which the stage {task.stage} trains")
        if exported[name].shape != value.shape:
            shape = tuple(exported[name].shape)
            raise ValueError(
                f"checkpoint.start_from={folder}: {name} has shape {shape}, but the stage needs {tuple(value.shape)}"
            )
        value.data.copy_(exported[name])


def _require_base(task: Task, path: Path, base_hash: str) -> None:
    if task.base_hash and base_hash != task.base_hash:
        raise ValueError(
            f"checkpoint.start_from={path} was trained on a base model with the hash {base_hash[:12]}, but this run's "
            f"base model has {task.base_hash[:12]}: give the checkpoint's base model with pretrained.folder=…"
        )


def describe_resumed(path: Path, *, strategy: str, world_size: int, base_hash: str) -> str:
    """Return the log message that says where the run resumes, with a table of the restored tensors."""
    manifest = read_manifest(path)
    meta: dict[str, Any] = manifest["meta"]
    now = inventory.writer({"strategy": strategy, "world_size": world_size})
    base = f"\n  the frozen base is not in it: {base_hash[:12]}, the same as when it was saved" if base_hash else ""
    table = inventory.contents(manifest).replace("\n", "\n  ")
    return (
        f"resumed from {path} at {meta['samples']} samples, {meta['steps']} steps; "
        f"written by {inventory.writer(meta)}, now {now}\n  {table}{base}"
    )
