"""Uploads a stage's checkpoints, documents and export to a store: whole or not there, and each file once.

A method is one try, which can be repeated: what is whole on the store is not sent again. The manifest of a checkpoint
comes last, so that a kill at any moment leaves nothing that looks whole. Needs no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models.documents import DamagedDocument, parse_json, to_json
from models.readable import is_broken_link
from trainer.checkpoints.manifest import LARGEST_MANIFEST, read_manifest
from trainer.checkpoints.names import MANIFEST, checkpoints, is_name, samples_of_name
from trainer.checkpoints.retention import Retention
from trainer.data.remote import MissingFileError
from trainer.files import file_digest
from trainer.run_documents import read_status
from trainer.stores.layout import (
    BEGUN,
    DOCUMENTS,
    DONE,
    LARGEST_DOCUMENT,
    Claim,
    foreign,
    read_claim,
    write_claim,
)
from trainer.stores.store import Store


class RefusedError(ValueError):
    """This start of the run may not write to the store, however often it tries."""


@dataclass
class Upload:
    """Uploads one stage of a run."""

    store: Store
    folder: Path
    """The stage's directory."""
    claim: Claim
    """This start of the run."""
    config: str
    """The text of the store's `config.yaml`."""
    retention: Retention
    moved: Callable[[str, int, int], None] = lambda what, sent, of: None
    """Told what is on its way, how many bytes of it have gone, and how many it has."""
    begins: int = 0
    """Samples from which the run goes on. What the store has beyond them when this start first looks is not its own."""
    damaged: set[str] = field(default_factory=set)
    """Names of checkpoints on the store that a download has found damaged. They count as not whole."""
    _claimed: bool = False
    _metas: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    """What was read of manifests on the store."""

    @property
    def stage(self) -> str:
        """The name of the stage, which is its folder on the store."""
        return self.folder.name

    def begin(self) -> None:
        """Claim the URL for this start of the run. Raises as `checkpoint` does."""
        self._require_claim()

    def checkpoint(self, name: str) -> None:
        """Upload a checkpoint, with the snapshots and documents that belong to it; then delete what is not kept.

        Raises:
            RefusedError: another run or another start writes there, or the store has newer checkpoints.
            FileNotFoundError: the checkpoint is no longer in the run's directory.
            Exception: what the store's package raises.
        """
        self._require_claim()
        self._send_checkpoint(name)
        self._prune(name)

    def export(self) -> None:
        """Upload the export and the documents of a stage that is done. Raises as `checkpoint` does."""
        self._require_claim()
        status = read_status(self.folder)
        paths = [path for path in sorted((self.folder / "export").rglob("*")) if path.is_file()]
        files = {path.relative_to(self.folder).as_posix(): _facts(path) for path in paths}
        done = {"samples": status.get("samples", 0), "files": files}
        if self._content(DONE, most=LARGEST_DOCUMENT) == (content := to_json(done, indent=1).encode()):
            return
        self.store.remove(f"{self.stage}/{DONE}")
        self._begin("", {"export": hashlib.sha256(content).hexdigest()}, lambda: self._remove_files(files))
        self._send("export", {name: self.folder / name for name in files}, _sizes_of(files))
        self.documents()
        self._require_ours()
        self.store.write(f"{self.stage}/{DONE}", content)

    def documents(self) -> None:
        """Upload the small documents of the stage."""
        self.store.write(f"{self.stage}/config.yaml", self.config.encode())
        for name in DOCUMENTS:
            path = self.folder / name
            if path.is_file():
                with path.open("rb") as file:  # a log grows meanwhile: whole lines of it are enough
                    self.store.write(f"{self.stage}/{name}", file.read(LARGEST_DOCUMENT))

    def went_back(self, name: str) -> None:
        """Delete the checkpoints and snapshots after one to which the run was rewound, once that one is whole there.

        Raises as `checkpoint` does.
        """
        self._require_claim()
        if not is_gone(self.folder, name):  # it may have been left out, if a newer one came while it waited
            self._send_checkpoint(name)
        for kind in ("checkpoints", "averages"):
            for later in self._names(kind):
                if samples_of_name(later) > samples_of_name(name):
                    self._remove(f"{kind}/{later}")

    def _send_checkpoint(self, name: str) -> None:
        for snapshot in checkpoints(self.folder / "averages"):
            if samples_of_name(snapshot.name) <= samples_of_name(name):
                self._step(f"averages/{snapshot.name}")
        self._step(f"checkpoints/{name}", before_manifest=self.documents)

    def _require_claim(self) -> None:
        """Claim the URL for this start of the run, unless it has done so: the start before may write no longer."""
        if self._claimed:
            self._require_ours()
            return
        held = self._held()
        if held is None and self.store.list():
            raise RefusedError(
                f"{self.store.url} holds files that no run wrote: give an empty folder with checkpoint.upload=…"
            )
        if held is not None and held.run != self.claim.run:
            raise RefusedError(foreign(self.store, held))
        if held is not None and held.token == self.claim.token:  # a process of this start that has ended claimed it
            self._claimed = True
            return
        later = [name for name in self._whole() if samples_of_name(name) > self.begins]
        if later:
            raise RefusedError(
                f"{self.store.url}/{self.stage} holds {later[-1]}, which is newer than what this run goes on from: "
                f"repeat the command to go on from there, or give another checkpoint.upload=…"
            )
        write_claim(self.store, self.claim)
        self._claimed = True

    def _held(self) -> Claim | None:
        try:
            return read_claim(self.store)
        except DamagedDocument as error:  # to read it again would show the same
            raise RefusedError(str(error)) from None

    def _require_ours(self) -> None:
        held = self._held()
        if held is not None and held.run == self.claim.run and held.token == self.claim.token:
            return
        who = f"another start of this run, on {held.host}," if held and held.run == self.claim.run else "another run"
        raise RefusedError(f"{who} has taken {self.store.url} over: nothing more of this start is uploaded")

    def _step(self, where: str, before_manifest: Callable[[], None] = lambda: None) -> None:
        """Upload a checkpoint or a snapshot, whose folder below the stage's is `where`."""
        path = self.folder / where
        manifest = (path / MANIFEST).read_bytes()
        if where.startswith("checkpoints/") and path.name in self.damaged:
            self._remove(where)
        if self._content(f"{where}/{MANIFEST}", most=LARGEST_MANIFEST) == manifest:
            return
        files = read_manifest(path)["files"]
        self._begin(where, {"manifest": hashlib.sha256(manifest).hexdigest()}, lambda: self._remove(where))
        sizes = _sizes_of(files)
        self._send(path.name, {f"{where}/{name}": path / name for name in files}, sizes)
        before_manifest()
        there = self.store.list(f"{self.stage}/{where}")
        if lacking := [name for name, size in sizes.items() if there.get(name) != size]:
            raise OSError(f"{self.store.url}/{self.stage}/{where}/{lacking[0]} is not whole on the store")
        self._require_ours()
        self.store.write(f"{self.stage}/{where}/{MANIFEST}", manifest)

    def _begin(self, where: str, content: Mapping[str, str], clear: Callable[[], None]) -> None:
        """Note in a folder of the stage what is sent there next; `clear` deletes what was sent of anything else.

        Files of another content may have the same names and sizes.
        """
        begun, name = json.dumps(content).encode(), f"{where}/{BEGUN}".lstrip("/")
        if self._content(name, most=1 << 10) != begun:
            clear()
            self.store.write(f"{self.stage}/{name}", begun)

    def _send(self, what: str, files: Mapping[str, Path], sizes: Mapping[str, int]) -> None:
        """Upload files, name below the stage's folder → path, except those that are whole on the store."""
        of, sent = sum(sizes.values()), 0

        def moved(count: int) -> None:
            nonlocal sent
            sent += count
            self.moved(what, min(sent, of), of)

        there = {folder: self.store.list(f"{self.stage}/{folder}") for folder in {_folder(name) for name in files}}
        moved(0)
        for name, path in files.items():
            size, before = path.stat().st_size, sent
            whole = there[_folder(name)].get(path.name) == size and self.store.holds(f"{self.stage}/{name}", path)
            if not whole:
                self.store.send(f"{self.stage}/{name}", path, moved)
            moved(size - (sent - before))

    def _prune(self, newest: str) -> None:
        """Delete the checkpoints that the local rule would not keep, and what was cut off of others."""
        there = self._names("checkpoints")
        whole = {name: meta for name in there if (meta := self._meta(name)) is not None}
        kept = self.retention.kept({samples_of_name(name): meta for name, meta in whole.items()})
        for name in there:
            if name != newest and (name not in whole or samples_of_name(name) not in kept):
                self._require_ours()
                self._remove(f"checkpoints/{name}")

    def _names(self, kind: str) -> list[str]:
        """Return the names of the folders of checkpoints on the store, oldest first."""
        names = filter(is_name, self.store.list(f"{self.stage}/{kind}"))
        return sorted(names, key=samples_of_name)

    def _whole(self) -> list[str]:
        return [name for name in self._names("checkpoints") if self._meta(name) is not None]

    def _meta(self, name: str) -> Mapping[str, Any] | None:
        """Return the `meta` of a checkpoint on the store; empty if its manifest is damaged, None if it is not whole."""
        if name in self.damaged:
            return None
        if name not in self._metas:
            content = self._content(f"checkpoints/{name}/{MANIFEST}", most=LARGEST_MANIFEST)
            if content is None:
                return None
            try:
                manifest = parse_json(content, dict[str, Any], name, mend="")
                self._metas[name] = manifest["meta"] if isinstance(manifest.get("meta"), dict) else {}
            except DamagedDocument:
                self._metas[name] = {}
        return self._metas[name]

    def _content(self, name: str, *, most: int) -> bytes | None:
        """Return a small file of the stage on the store; None if it is missing."""
        try:
            return self.store.content(f"{self.stage}/{name}", most=most)
        except MissingFileError:
            return None

    def _remove(self, where: str) -> None:
        name = where.rpartition("/")[2]
        self._metas.pop(name, None)
        self.store.remove_folder(f"{self.stage}/{where}", first=MANIFEST)
        if where.startswith("checkpoints/"):
            self.damaged.discard(name)

    def _remove_files(self, names: Iterable[str]) -> None:
        for name in names:
            self.store.remove(f"{self.stage}/{name}")


def is_gone(folder: Path, name: str) -> bool:
    """Whether a checkpoint that was to be uploaded has been deleted from a stage's directory."""
    path = folder / "checkpoints" / name
    return not path.exists() and not is_broken_link(path)


def _sizes_of(files: Mapping[str, Any]) -> dict[str, int]:
    return {name: entry["bytes"] for name, entry in files.items()}


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


def _facts(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": file_digest(path)}
