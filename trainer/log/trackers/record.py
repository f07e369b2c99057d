"""What a run keeps of its run in a tracker, so that a resumed run goes on in the same one: `trackers/NAME.json`."""

from __future__ import annotations

import logging
import secrets
from typing import TypedDict

from models.documents import DamagedDocument, Natural, write_json
from trainer.log.trackers.events import HeardClip, Points
from trainer.run_directory import RunDirectory
from trainer.run_documents import read_optional

logger = logging.getLogger(__name__)


class TrackerRun(TypedDict):
    """The content of `trackers/NAME.json`."""

    id: str
    """Id of the run in the tracker; empty before the tracker has given one."""
    rows: Natural
    """Events that the tracker has."""
    until: dict[str, Natural]
    """Kind of line, or name of a clip → samples seen at the newest one that the tracker has."""


class TrackerRecord:
    """The id of a run in one tracker, and how far the tracker has its curves."""

    def __init__(self, run: RunDirectory, name: str) -> None:
        """Read the record of an earlier start, if there is one; a damaged one begins another run in the tracker."""
        self.run, self.path = run, run.path / "trackers" / f"{name}.json"
        self.fresh = True
        """Whether no earlier start has written to the tracker."""
        self.content = TrackerRun(id="", rows=0, until={})
        try:
            if known := read_optional(self.path, TrackerRun, mend="another run begins in the tracker"):
                self.content, self.fresh = known, not known["id"]
        except DamagedDocument as error:
            logger.warning("%s", error)

    @property
    def id(self) -> str:
        """Id of the run in the tracker."""
        return self.content["id"]

    def name_it(self, id_: str = "") -> str:
        """Keep the id of a new run, drawn at random if none is given; return it. The last id stays if it has one."""
        if id_ or not self.id:
            self.content["id"] = id_ or secrets.token_hex(6)
            self._write()
        return self.id

    def is_new(self, event: Points | HeardClip) -> bool:
        """Whether the tracker lacks an event: steps that are done again give events that it has."""
        return event.samples > self.content["until"].get(event.key, -1)

    def has(self, event: Points | HeardClip) -> None:
        """Keep that the tracker has an event."""
        self.content["until"][event.key] = event.samples
        self.content["rows"] += 1
        self._write()

    def forget(self) -> None:
        """Begin another run in the tracker, which does not know the last one any more."""
        self.content, self.fresh = TrackerRun(id="", rows=0, until={}), True

    def _write(self) -> None:
        self.run.require_ownership()
        write_json(self.path, self.content, durable=False)
