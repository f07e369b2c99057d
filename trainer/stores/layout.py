"""What lies where below the URL of a run, and the small documents there.

owner.json                      the run that writes here, see `Claim`
STAGE/config.yaml, metrics.jsonl …      the stage's small documents
STAGE/checkpoints/step_SAMPLES/         a checkpoint; `manifest.json` is written last and deleted first
STAGE/averages/step_SAMPLES/            a snapshot of the averages, likewise
STAGE/export/                   the export
STAGE/begun.json                what of the export is sent there now, or was last
STAGE/done.json                 written last: sizes and checksums of the export and the documents
"""

from __future__ import annotations

import json
import secrets
import socket
import time
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypedDict

from models.documents import DamagedDocument, Moment, Natural, parse_json, read_json, write_json
from trainer.data.remote import MissingFileError, is_url
from trainer.recipes.watching import TRACKERS
from trainer.stores.store import Store

OWNER = "owner.json"
BEGUN = "begun.json"
"""File in a folder of the store: the checksum of what is being sent there: of a manifest, or of a `done.json`."""
DONE = "done.json"
DOCUMENTS = (
    *("inputs.json", "metrics.jsonl", "incident.json", "attempts/history.jsonl", "status.json"),
    *(f"trackers/{name}.json" for name in TRACKERS),  # so that a fresh node goes on in the same run of a tracker
)
"""Small files of a stage that go up with its checkpoints. So does `config.yaml`, but without what may be secret."""
LARGEST_DOCUMENT = 64 << 20
"""Bytes of a small document, of which none has more than a part."""

_ID = "store.json"
_MEND = "give another checkpoint.upload=…"


class FileFacts(TypedDict):
    """One file of an export."""

    bytes: Natural
    sha256: str


class DoneDocument(TypedDict):
    """The content of `done.json`."""

    samples: Natural
    files: dict[str, FileFacts]
    """Name below the stage's folder → size and checksum."""


@dataclass(frozen=True)
class Claim:
    """The content of `owner.json`: which run writes below a URL, and which start of it."""

    run: str
    """Id of the run, the same on every disk that it has been on."""
    token: str
    """Id of the start that writes. A later start replaces it, and an earlier one that still lives then stops."""
    name: str
    """Name of the recipe."""
    host: str
    began: Moment
    settings: dict[str, str] = field(default_factory=dict)
    """Stage → hash of the settings that it learns from."""

    @property
    def told(self) -> str:
        """The run, for people."""
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.began))
        return f"the run {self.name}, whose last start was on {self.host} at {when}"


def new_claim(run: str, name: str, settings: dict[str, str]) -> Claim:
    """Return the claim of this start of a run."""
    return Claim(run, secrets.token_hex(8), name, socket.gethostname(), round(time.time()), settings)


def read_claim(store: Store) -> Claim | None:
    """Read who writes below a URL; None if nobody does. Raises ValueError as `Remote.content` does."""
    try:
        content = store.content(OWNER, most=LARGEST_DOCUMENT)
    except MissingFileError:
        return None
    return parse_json(content, Claim, f"{store.url}/{OWNER}", mend=_MEND)


def write_claim(store: Store, claim: Claim) -> None:
    """Write who writes below a URL."""
    store.write(OWNER, json.dumps(asdict(claim), indent=1).encode())


def foreign(store: Store, claim: Claim) -> str:
    """Say that another run has a URL, and the mend."""
    own = "or resume that run in its own run_dir"
    return f"checkpoint.upload={store.url} holds another run ({claim.told}): {_MEND}, {own}"


def run_id(run_dir: Path) -> str | None:
    """Return the id of a run that has been uploaded from a directory, or fetched to it; None if it has none."""
    try:
        return read_json(run_dir / _ID, dict[str, str], mend=f"remove it, and {_MEND}").get("run")
    except FileNotFoundError:
        return None


def keep_run_id(run_dir: Path, run: str) -> str:
    """Keep the id of a run in its directory; return it."""
    write_json(run_dir / _ID, {"run": run})
    return run


def own_run_id(run_dir: Path) -> str:
    """Return the id of a run, which is made if it has none."""
    return run_id(run_dir) or keep_run_id(run_dir, secrets.token_hex(8))


def read_done(store: Store, stage: str) -> dict[str, Any] | None:
    """Read what the store has of a stage that is done; None if it is not done there, or the document is damaged.

    `stage` is empty if the store's own URL is that of the stage.
    """
    try:
        content = store.content(f"{stage}/{DONE}".lstrip("/"), most=LARGEST_DOCUMENT)
        return parse_json(content, DoneDocument, f"{store.url}/{stage}/{DONE}", mend=_MEND)  # type: ignore[return-value]
    except (MissingFileError, DamagedDocument):
        return None


def located(location: str, folder: Path) -> Path:
    """Return where a checkpoint or an export, given by path or URL, lies on this machine.

    Args:
        location: the path, or the URL from which `trainer.stores.fetch` copies it.
        folder: the directory of the stage that reads it.
    """
    if not is_url(location):
        return Path(location)
    url = location.rstrip("/")
    return folder / "fetched" / blake2b(url.encode(), digest_size=8).hexdigest() / url.rpartition("/")[2]
