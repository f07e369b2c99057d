"""Fetches what a run needs and its directory lacks: on an empty disk a run goes on from the store.

This happens before the ranks start to train. Where every rank is a process that a launcher has started, the first one
of each node, or of a shared disk, fetches, and the others wait for it.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from models.documents import read_json, write_json
from trainer.checkpoints import checkpoint
from trainer.checkpoints.names import MANIFEST, checkpoints, is_name, samples_of, samples_of_name
from trainer.checkpoints.problems import find_problems
from trainer.checkpoints.resume import was_followed
from trainer.data.remote import MissingFileError, is_url
from trainer.files import long_turn
from trainer.recipes.schema import Config
from trainer.run_directory import RunDirectory, stage_folder
from trainer.run_documents import UPLOAD
from trainer.stage_inputs import stage_inputs
from trainer.stages import STAGES
from trainer.stores.download import DamagedCopyError, copy_checkpoint, copy_files
from trainer.stores.layout import (
    BEGUN,
    DOCUMENTS,
    LARGEST_DOCUMENT,
    foreign,
    keep_run_id,
    located,
    read_claim,
    read_done,
    run_id,
)
from trainer.stores.store import Store
from trainer.stores.uploads import settings_of

logger = logging.getLogger(__name__)

_LOCK, _FETCHED = ".fetch.lock", ".fetched.json"
_LONGEST_WAIT = 4 * 3600.0  # seconds that a rank waits for another one to fetch
_SHORT = 30.0  # seconds to ask a store that does not answer, if the run can go on without it
_MOST_FILES = 1000  # of an export


def fetch(config: Config, stage: str, *, launch: tuple[str, int] = ("", 0)) -> None:
    """Fetch what a stage needs from URLs and from the run's own store.

    Args:
        config: the recipe.
        stage: the trained stage that is about to run.
        launch: the launcher's id of this start, of all ranks, and how often it was restarted; empty for one process.

    Raises:
        ValueError: another run writes to the store, what is there can't be read, or nothing there is whole. The message
            has the mend.
    """
    named = (config.checkpoint.resume, config.checkpoint.start_from)
    urls = [location for location in named if location is not None and is_url(location)]
    if config.checkpoint.upload is None and not urls:
        return
    root = Path(config.run_dir)
    root.mkdir(parents=True, exist_ok=True)
    step = os.environ.get("SLURM_STEP_ID", "")  # a job may run the command more than once
    start = {"launch": launch[0], "restart": str(launch[1]), "step": step, "stage": stage, "urls": " ".join(urls)}
    with long_turn(root / _LOCK, seconds=_LONGEST_WAIT):
        if launch[0] and _read_start(root) == start:
            return  # another rank of this start has fetched it
        for location in urls:
            _fetch_named(config, stage_folder(config, stage), location)
        if config.checkpoint.upload is not None:
            _Run(config, stage).fetch()
        if launch[0]:
            write_json(root / _FETCHED, start, durable=False)


def _read_start(root: Path) -> dict[str, str]:
    try:
        return read_json(root / _FETCHED, dict[str, str], mend="")
    except (FileNotFoundError, ValueError):
        return {}


def _fetch_named(config: Config, folder: Path, url: str) -> None:
    """Copy the checkpoint or the export at a URL to where `located` finds it. Raises ValueError."""
    into = located(url, folder)
    if into.is_dir():
        return
    growing = into.with_name(f"part_{into.name}")
    root, _, name = url.rstrip("/").rpartition("/")
    store = Store(root, patience=config.data.cache.patience)
    logger.info("fetches %s", url)
    try:
        held = store.sizes(name)
        if MANIFEST in held:
            copy_checkpoint(store, name, growing)
        elif BEGUN in held:
            raise _unfinished(url)
        elif files := _files_of_export(store, name):
            growing.mkdir(parents=True, exist_ok=True)
            copy_files(store, name, growing, files)
        else:
            raise ValueError(f"{url} holds neither a checkpoint nor an export: give the URL of a step_… or an export/")
    except DamagedCopyError as error:
        raise ValueError(f"{url} can't be used: {error}; give another checkpoint") from None
    growing.rename(into)


def _files_of_export(store: Store, name: str) -> dict[str, dict[str, Any]]:
    """Return the files of an export, with their checksums if a run has uploaded them; else as the store lists them."""
    try:
        done = read_done(store, "") or {"files": {}}
    except ValueError:
        done = {"files": {}}
    prefix = f"{name}/"
    if known := {key.removeprefix(prefix): facts for key, facts in done["files"].items() if key.startswith(prefix)}:
        return known
    if BEGUN in store.sizes():
        raise _unfinished(f"{store.url}/{name}")
    listed = dict(_listed(store, name, ""))
    if len(listed) > _MOST_FILES:
        raise ValueError(f"{store.url}/{name} holds {len(listed)} files, which no export does")
    return {key: {"bytes": count} for key, count in listed.items()}


def _unfinished(url: str) -> ValueError:
    return ValueError(
        f"{url} is not whole: the run that uploads it is not done with it, or was ended there; give another URL, or "
        f"repeat the command once that run has gone on"
    )


def _listed(store: Store, folder: str, prefix: str, depth: int = 2) -> Iterator[tuple[str, int]]:
    for name, count in store.sizes(folder).items():
        if count >= 0:
            yield f"{prefix}{name}", count
        elif depth:
            yield from _listed(store, f"{folder}/{name}", f"{prefix}{name}/", depth - 1)


class _Run:
    """A run whose directory may lack what its store has."""

    def __init__(self, config: Config, stage: str) -> None:
        self.config, self.stage, self.root = config, stage, Path(config.run_dir)
        self.url = str(config.checkpoint.upload)
        self.trained = [name for name in config.stages if STAGES[name].trained]
        self.directories = {name: RunDirectory(stage_folder(config, name), name) for name in self.trained}
        self.own = self.directories.setdefault(stage, RunDirectory(stage_folder(config, stage), stage))
        self.has_state = any(checkpoints(run.checkpoints) for run in self.directories.values())
        patience = config.data.cache.patience
        self.store = Store(self.url, patience=min(_SHORT, patience) if self.has_state else patience)

    def fetch(self) -> None:
        """Fetch the exports of earlier stages, and this stage's export or newest checkpoint."""
        try:
            ours = self._is_ours()
        except _ForeignError:
            raise
        except ValueError as error:
            if not self.has_state:
                raise ValueError(
                    f"{error}; whether {self.url} holds a checkpoint of this run is unknown: repeat the command, or "
                    f"remove checkpoint.upload to begin anew without it"
                ) from None
            logger.warning("%s; the run goes on from its own directory", error)
            return
        if not ours:
            return
        for name in self.trained[: self.trained.index(self.stage)] if self.stage in self.trained else []:
            if not self.directories[name].done(self.config):
                self._fetch_done(self.directories[name])
        if self.own.done(self.config) or self._fetch_done(self.own):
            return
        self._fetch_checkpoint()

    def _is_ours(self) -> bool:
        """Whether the store holds this run; False if it holds none. Raises _ForeignError if it holds another."""
        claim = read_claim(self.store)
        if claim is None:
            if self.store.sizes():
                raise _ForeignError(
                    f"checkpoint.upload={self.url} holds files that no run wrote: give an empty folder of the store"
                )
            if not self.has_state and not self.store.has_bucket():
                raise ValueError(f"{self.url}: there is no such bucket, or it may not be listed: check its name")
            return False
        if (known := run_id(self.root)) == claim.run:
            return True
        settings = settings_of(self.config)
        other = [name for name, value in claim.settings.items() if settings.get(name, value) != value]
        if known is not None or self.has_state or other:
            raise _ForeignError(
                foreign(self.store, claim) + (f"; {other[0]} has other settings there" if other else "")
            )
        keep_run_id(self.root, claim.run)
        logger.info("the directory is empty, and %s holds this run: it goes on from there", self.url)
        return True

    def _fetch_done(self, run: RunDirectory) -> bool:
        """Fetch the export of a stage that is done on the store; returns whether it is."""
        done = read_done(self.store, run.stage)
        if done is None or done["samples"] < self.config.stage(run.stage).samples:
            return False
        self._require_same(run)
        growing = run.path / "fetching" / "done"
        growing.mkdir(parents=True, exist_ok=True)
        files = {name: facts for name, facts in done["files"].items() if name.startswith("export/")}
        logger.info("fetches the export of %s from %s", run.stage, self.url)
        try:
            copy_files(self.store, run.stage, growing, files)
        except DamagedCopyError as error:
            logger.warning("DAMAGED EXPORT on the store is passed over: %s", error)
            return False
        self._fetch_documents(run)
        if run.export.exists():
            run.export.rename(run.path / f"left_export_{secrets.token_hex(4)}")
        (growing / "export").rename(run.export)
        shutil.rmtree(run.path / "fetching")
        write_json(run.path / UPLOAD, {"url": self.url, "time": time.time(), "whole": "export"}, durable=False)
        return True

    def _fetch_checkpoint(self) -> None:
        """Fetch the newest checkpoint of the store that is whole, unless the directory has one that is as new."""
        run = self.own
        there = [name for name in self.store.sizes(f"{run.stage}/checkpoints") if is_name(name)]
        whole = sorted((name for name in there if self._has_manifest(name)), key=samples_of_name, reverse=True)
        # With checksums, as the run does when it resumes: it would pass over a damaged one that the store has whole.
        ours = reversed(checkpoints(run.checkpoints)) if whole else iter(())
        local = next((path for path in ours if not find_problems(path)), None)
        newer = [name for name in whole if local is None or samples_of_name(name) > samples_of(local)]
        if newer:
            self._require_may_go_on(newer[0])
            self._require_same(run)
        damaged: list[str] = []
        for name in newer:
            try:
                self._copy(name)
                break
            except DamagedCopyError as error:
                damaged.append(name)
                logger.warning("DAMAGED CHECKPOINT %s/%s/%s is passed over: %s", self.url, run.stage, name, error)
        else:
            if damaged and local is None:
                raise ValueError(
                    f"{self.url}/{run.stage} holds no whole checkpoint, {len(damaged)} damaged: begin anew with "
                    f"another checkpoint.upload=…, or resume from another checkpoint with checkpoint.resume=PATH"
                )
        if damaged:  # this start may write beside them, and replaces them
            write_json(run.path / UPLOAD, {"url": self.url, "time": time.time(), "damaged": damaged}, durable=False)

    def _has_manifest(self, name: str) -> bool:
        return MANIFEST in self.store.sizes(f"{self.own.stage}/checkpoints/{name}")

    def _require_may_go_on(self, newest: str) -> None:
        """Raise ValueError if the recipe does not let the run go on from the store's newest checkpoint."""
        choice = self.config.checkpoint.resume
        if choice == "auto" or (choice != "never" and was_followed(self.own, choice)):
            return
        raise ValueError(
            f"checkpoint.resume={choice}, but {self.url} holds this run at {samples_of_name(newest)} samples: give "
            f"another checkpoint.upload=…, or leave out checkpoint.resume to go on from there"
        )

    def _require_same(self, run: RunDirectory) -> None:
        """Raise ValueError if the store's run has other settings or inputs; nothing has been put in its place yet."""
        folder = run.path / "fetching" / "compared"
        for name in ("config.yaml", "inputs.json"):
            self._fetch_document(run.stage, name, folder / name)
        if differing := run.differences(folder, self.config, stage_inputs(self.config, run.stage)):
            raise ValueError(
                f"{self.url}/{run.stage} holds a run with other settings: {differing}. Give another checkpoint.upload=…"
            )

    def _copy(self, name: str) -> None:
        """Copy a checkpoint with its snapshots and documents, and put it in its place last."""
        run = self.own
        logger.info("fetches %s of %s from %s", name, run.stage, self.url)
        growing = run.path / "fetching"
        copy_checkpoint(self.store, f"{run.stage}/checkpoints/{name}", growing / "checkpoints" / name)
        self._copy_snapshots(name, growing)
        self._fetch_documents(run)
        place = run.checkpoints / name
        if place.exists():
            checkpoint.set_aside(place, find_problems(place))
        run.checkpoints.mkdir(parents=True, exist_ok=True)
        (growing / "checkpoints" / name).rename(place)
        shutil.rmtree(growing)

    def _copy_snapshots(self, name: str, growing: Path) -> None:
        """Copy the snapshots of the averages up to a checkpoint, except those that are here."""
        run = self.own
        for snapshot in self.store.sizes(f"{run.stage}/averages"):
            place = run.averages / snapshot
            if not is_name(snapshot) or samples_of_name(snapshot) > samples_of_name(name) or place.exists():
                continue
            try:
                copy_checkpoint(self.store, f"{run.stage}/averages/{snapshot}", growing / "averages" / snapshot)
            except DamagedCopyError as error:  # the run goes on with the others, as with a damaged one on the disk
                logger.warning("the averages in %s/%s are left out: %s", self.url, snapshot, error)
                continue
            run.averages.mkdir(parents=True, exist_ok=True)
            (growing / "averages" / snapshot).rename(place)

    def _fetch_documents(self, run: RunDirectory) -> None:
        for name in ("config.yaml", *DOCUMENTS):
            self._fetch_document(run.stage, name, run.path / name)

    def _fetch_document(self, stage: str, name: str, path: Path) -> None:
        try:
            content = self.store.content(f"{stage}/{name}", most=LARGEST_DOCUMENT)
        except MissingFileError:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        growing = path.with_name(f".{path.name}.part")
        growing.write_bytes(content)
        growing.replace(path)


class _ForeignError(ValueError):
    """The store belongs to something else."""
