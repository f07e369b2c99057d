"""Uploads beside training, from rank 0's side: hands over what is complete, and never waits before the end of a run.

`trainer.stores.upload_process` does the work, in a process of its own.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from trainer.checkpoints.retention import Retention
from trainer.progress import Progress
from trainer.recipes.privacy import stored_yaml
from trainer.recipes.schema import Config
from trainer.run_directory import RunDirectory, stage_folder
from trainer.run_documents import read_status, read_upload
from trainer.stages import STAGES
from trainer.stop import Stop
from trainer.stores.layout import Claim, new_claim, own_run_id

logger = logging.getLogger(__name__)

_AT_A_STOP = 60.0  # seconds that a run which was asked to stop goes on uploading for, if its deadline leaves them
_MARGIN = 5.0  # seconds before the deadline at which it ends the upload
_NO_MOVE = 600.0  # seconds without a byte after which the end of a run waits no longer
_LOOK = 0.1  # seconds between two looks at how far an upload is
_CODE = Path(__file__).resolve().parents[2]


class Uploads:
    """The uploads of one stage; without `checkpoint.upload`, or on a rank other than 0, all methods do nothing.

    Use it as a context manager. On exit it waits: at the end of a stage until all is on the store, or nothing moves for
    minutes; where the run was asked to stop, for a short while. After an error it does not wait.
    """

    def __init__(self, config: Config, stage: str, stop: Stop, *, main: bool) -> None:
        self.config, self.stop = config, stop
        self.url = config.checkpoint.upload if main else None
        self.folder = stage_folder(config, stage)
        self._begins = 0
        self._claim: Claim | None = None
        """The same for each process of this start: one that replaces another may go on with what that has uploaded."""
        self._process: subprocess.Popen[str] | None = None
        self._number, self._open = 0, dict[int, Path | None]()
        self._turn = threading.Lock()
        self._progress: dict[str, Any] = {}
        self._far: dict[tuple[str, int], int] = {}
        """What is on its way, and its bytes → the most of them that had gone at any time."""
        self._moved_at = 0.0
        self._ending = False
        self._stopped_at: float | None = None

    def begin(self, samples: int, source: Path | None = None) -> None:
        """Claim the URL for this start of the run; call this before anything else.

        Args:
            samples: those that the run has seen.
            source: the checkpoint of this run that it goes on from, which is uploaded unless it is there.
        """
        self._begins = samples
        self._ask("begin")
        if source is not None:
            self.checkpoint(source)

    def checkpoint(self, path: Path) -> set[Path]:
        """Upload a complete checkpoint; return those that are being read, which must stay on the disk."""
        self._ask("checkpoint", path.name, path)
        return self.held

    @property
    def held(self) -> set[Path]:
        """The checkpoint on the disk that is being uploaded, and the one that waits: those in between are dropped."""
        with self._turn:
            paths = [path for path in self._open.values() if path is not None]
        return {*paths[:1], *paths[-1:]}

    def went_back(self, path: Path) -> None:
        """Delete from the store what is later than the checkpoint to which the run was rewound, once this is there."""
        self._ask("went_back", path.name, path)

    def export(self) -> None:
        """Upload the export of a stage that is done. `__exit__` then waits for it."""
        self._ending = True
        self._ask("export")

    def _ask(self, kind: str, name: str = "", path: Path | None = None) -> None:
        if self.url is None:
            return
        try:
            process = self._running()
            with self._turn:
                self._number += 1
                self._open[self._number] = path
                request = {"number": self._number, "kind": kind, "name": name}
            _write(process, request)
        except (OSError, ValueError) as error:  # no upload ends a run
            self._open.clear()
            logger.warning("%s is not uploaded: %s", name or "the export", error)

    def _running(self) -> subprocess.Popen[str]:
        """Return the process that uploads, which is started if it does not run."""
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._open.clear()
        log = self.folder / "logs" / "upload.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        paths = [str(_CODE), *filter(None, [os.environ.get("PYTHONPATH")])]
        with log.open("ab") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", "trainer.stores.upload_process"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
                start_new_session=True,
            )
        _write(process, self._job())
        self._process = process
        self._listener = threading.Thread(target=self._listen, args=(process,), name="uploads", daemon=True)
        self._listener.start()
        return process

    def _job(self) -> dict[str, Any]:
        keep, stage = self.config.checkpoint, self.folder.name
        if self._claim is None:
            run = own_run_id(Path(self.config.run_dir))
            self._claim = new_claim(run, self.config.name, settings_of(self.config))
        return {
            "url": self.url,
            "folder": str(self.folder.absolute()),
            "claim": asdict(self._claim),
            "config": stored_yaml(self.config, RunDirectory(self.folder, stage).learns_from),
            "retention": asdict(Retention(keep.keep_last, keep.keep_best, keep.keep_every)),
            "begins": self._begins,
            "damaged": self._damaged_there(),
        }

    def _damaged_there(self) -> list[str]:
        """Return the names of the checkpoints at the URL that `fetch` has found damaged."""
        try:
            state = read_upload(self.folder)
        except ValueError:  # the process that uploads writes the document anew
            return []
        return state.get("damaged", []) if state.get("url") == self.url else []

    def _listen(self, process: subprocess.Popen[str]) -> None:
        """Log what the process says, until it ends."""
        assert process.stdout is not None
        for line in process.stdout:
            facts = json.loads(line)
            if "warning" in facts:
                logger.warning("%s", facts["warning"])
            elif "info" in facts:
                logger.info("%s", facts["info"])
            elif "sending" in facts:
                self._progress = facts
                what = facts["sending"], facts["of"]
                if facts["sent"] > self._far.get(what, 0):  # a try that gets no farther moves nothing
                    self._far[what], self._moved_at = facts["sent"], time.monotonic()
            elif "answered" in facts:
                self._far, self._moved_at = {}, time.monotonic()
                with self._turn:
                    self._open.pop(facts["answered"], None)
        if self._process is process and self._open:
            logger.warning("the process that uploads has ended, see %s", self.folder / "logs" / "upload.log")
            self._open.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None and self._process is not None and (self.folder / "trackers").is_dir():
                self._ask("documents")  # the trackers have ended, and a fresh node needs to know how far they are
            if error is None and self._open:
                self._wait()
        finally:
            self._end()

    def _wait(self) -> None:
        """Wait until nothing is open, as long as it is worth it."""
        self._moved_at = time.monotonic()
        logger.info("%s: waits for its upload to %s", self.folder.name, self.url)
        with Progress(f"{self.folder.name}: upload", total=1, unit="MB") as progress:
            while self._open and not self._is_late():
                time.sleep(_LOOK)
                if self._progress:
                    progress.to(round(self._progress["sent"] / 1e6, 1), of=round(self._progress["of"] / 1e6, 1))
        if self._open:
            logger.warning(
                "%s is not uploaded whole to %s: repeat the command to upload the rest", self.folder.name, self.url
            )

    def _is_late(self) -> bool:
        if self._ending and not self.stop():
            return time.monotonic() - self._moved_at > _NO_MOVE
        self._stopped_at = self._stopped_at or time.monotonic()
        return time.monotonic() - self._stopped_at > _AT_A_STOP or self.stop.has_less_than(_MARGIN)

    def _end(self) -> None:
        if self._process is not None:
            process, self._process = self._process, None
            process.kill()  # what it was sending is not whole on the store, and a later start goes on with it
            process.wait()
            self._listener.join()
            for stream in (process.stdin, process.stdout):
                _close(stream)


def settings_of(config: Config) -> dict[str, str]:
    """Return a hash of the settings that each trained stage of a recipe learns from, whatever its inputs are."""
    return {
        stage: RunDirectory(stage_folder(config, stage), stage).identity(config, {})
        for stage in config.stages
        if STAGES[stage].trained
    }


def finish_upload(config: Config, stage: str) -> None:
    """Upload the export of a stage that was done before, unless it is on the store; waits for it."""
    folder = stage_folder(config, stage)
    state = read_upload(folder)
    if config.checkpoint.upload is None or (state.get("whole"), state.get("url")) == (
        "export",
        config.checkpoint.upload,
    ):
        return
    with Uploads(config, stage, Stop(), main=True) as uploads:
        uploads.begin(read_status(folder).get("samples", 0))
        uploads.export()


def _write(process: subprocess.Popen[str], value: dict[str, Any]) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(value) + "\n")
    process.stdin.flush()


def _close(stream: IO[str] | None) -> None:
    try:
        if stream is not None:
            stream.close()
    except OSError:  # the process has ended, and its last request was not read
        pass
