"""The trackers TensorBoard, Weights & Biases, MLflow and Trackio, through Accelerate's tracker classes.

All show the same curves against samples seen. TensorBoard replaces what a resumed or rewound run does again. The others
can't take a point back: they keep the first one, and what is done again is not sent a second time (`TrackerRecord`).

The packages are imported in the tracker's thread, because an import takes seconds.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trainer.checkpoints.names import folder_name
from trainer.log.trackers.events import HeardClip, Points
from trainer.log.trackers.record import TrackerRecord
from trainer.run_directory import RunDirectory

_PATIENCE = 30.0  # seconds that W&B may take to begin, after which it writes to disk only


class TrackedRun(NamedTuple):
    """What trackers are told of a run."""

    run: RunDirectory
    project: str
    name: str
    """Name of the run in a tracker: that of the run and of the stage."""
    settings: dict[str, Any]
    """The settings that may be published, by their dotted keys."""
    settings_text: str
    """The same as YAML."""
    flush_seconds: float


class TensorBoardSink:
    """Writes `tensorboard/` of the run directory."""

    def __init__(self, tracked: TrackedRun, *, resumed_at: int) -> None:
        self.tracked, self.begins_at = tracked, resumed_at

    def start(self) -> None:
        """Open a file of events that replaces those after the samples at which it begins."""
        from accelerate.tracking import TensorBoardTracker

        folder = self.tracked.run.tensorboard
        self.tracker = _on_this_rank(
            TensorBoardTracker(folder.name, folder.parent, purge_step=self.begins_at + 1, flush_secs=10)
        )
        self.tracker.start()
        text = "\n".join(f"    {line}" for line in self.tracked.settings_text.splitlines())
        self.tracker.writer.add_text("config", text, self.begins_at)

    def points(self, event: Points) -> None:
        """See `Sink`; the writer has a thread of its own that flushes."""
        for name, value in event.values.items():
            self.tracker.writer.add_scalar(name, value, event.samples)

    def clip(self, event: HeardClip) -> None:
        """See `Sink`."""
        writer, samples = self.tracker.writer, event.samples
        writer.add_audio(event.key, event.audio_S[None], samples, sample_rate=event.sample_rate)
        writer.add_image(event.key, event.picture, samples, dataformats="HWC")

    def go_back(self, samples: int) -> None:
        """See `Sink`."""
        self.finish()
        self.begins_at = samples
        self.start()

    def finish(self) -> None:
        """See `Sink`."""
        self.tracker.finish()


class _FirstOnly:
    """A tracker that gets each point once."""

    name: str

    def __init__(self, tracked: TrackedRun) -> None:
        self.tracked = tracked
        self.record = TrackerRecord(tracked.run, self.name)

    def points(self, event: Points) -> None:
        """See `Sink`."""
        self._once(event, lambda: self.tracker.log(event.values, step=event.samples))

    def clip(self, event: HeardClip) -> None:
        """See `Sink`."""
        self._once(event, lambda: self.send_clip(event))

    def _once(self, event: Points | HeardClip, send: Callable[[], None]) -> None:
        if self.record.is_new(event):
            send()
            self.record.has(event)

    def send_clip(self, event: HeardClip) -> None:
        raise NotImplementedError

    def go_back(self, samples: int) -> None:
        """See `Sink`: the tracker keeps the curves that it has."""

    def finish(self) -> None:
        """See `Sink`."""
        self.tracker.finish()

    tracker: Any


class WandbSink(_FirstOnly):
    """Weights & Biases: `wandb/` of the run directory, sent to a server if there is one and a key for it.

    A row of W&B's own count is a line of the log or a clip, because W&B takes no row of a lower number. The curves are
    drawn against `samples`.
    """

    name = "wandb"

    def start(self) -> None:
        """Go on with the run; write to disk only, to be uploaded by `wandb sync`, if no server can be reached."""
        self.record.name_it()
        mode = os.environ.get("WANDB_MODE") or ("online" if _has_wandb_key() else "offline")
        try:
            self._start(mode)
        except Exception:
            if mode != "online":
                raise
            _end_wandb()  # its process still has the id of the run that could not begin
            self._start("offline")
        self.tracker.tracker.define_metric("*", step_metric="samples")

    def _start(self, mode: str) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")  # the settings below come too late for what a login says
        import wandb
        from accelerate.tracking import WandBTracker

        tracked = self.tracked
        # Neither the command line, nor the program's output, nor git's remote, any of which may hold a secret, is sent.
        settings = wandb.Settings(
            console="off",
            silent=True,
            disable_git=True,
            disable_code=True,
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_disable_stats=True,
            x_save_requirements=False,
            init_timeout=_PATIENCE,
            finish_timeout=tracked.flush_seconds,
        )
        tracked.run.path.mkdir(parents=True, exist_ok=True)
        self.tracker = WandBTracker(
            tracked.project,
            id=self.record.id,
            name=tracked.name,
            dir=str(tracked.run.path.resolve()),
            mode=mode,
            resume="allow",
            settings=settings,
        )
        self.tracker.start()
        self.tracker.store_init_configuration(tracked.settings)

    def points(self, event: Points) -> None:
        """See `Sink`."""
        self._once(event, lambda: self._send(event.values, event.samples))

    def send_clip(self, event: HeardClip) -> None:
        """Send a clip's sound and spectrogram."""
        import wandb

        values = {
            f"sounds/{event.key}": wandb.Audio(event.audio_S, sample_rate=event.sample_rate),
            f"spectrograms/{event.key}": wandb.Image(event.picture),
        }
        self._send(values, event.samples)

    def finish(self) -> None:
        """See `Sink`. W&B's process writes its last records after `finish`, and a job's end would kill it."""
        super().finish()
        _end_wandb()

    def _send(self, values: Mapping[str, Any], samples: int) -> None:
        self.tracker.log({**values, "samples": samples}, step=self.record.content["rows"], commit=True)


class MlflowSink(_FirstOnly):
    """MLflow: the server that MLFLOW_TRACKING_URI names, or the folder `mlflow/` of the whole run."""

    name = "mlflow"
    _folder: str | None = None
    """The run's folder that was last given to MLflow in this process."""

    def start(self) -> None:
        """Go on with the run, or begin one if the server does not know it."""
        import mlflow
        from mlflow.exceptions import MlflowException

        mlflow.set_tracking_uri(self._uri())
        try:
            self._start()
        except MlflowException as error:
            if not self.record.id or error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            self.record.forget()
            self._start()

    def _uri(self) -> str:
        """Return the URI that the user names, or the run's folder."""
        named = os.environ.get("MLFLOW_TRACKING_URI")
        # MLflow keeps the URI that it is given in the same variable: what an earlier stage left there names nothing.
        if named and named != MlflowSink._folder:
            return named
        # Folders need no database and no lock, which shared file systems often lack; MLflow 3 asks to be told.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        MlflowSink._folder = (self.tracked.run.path.parent.resolve() / "mlflow").as_uri()
        return MlflowSink._folder

    def _start(self) -> None:
        import mlflow
        from accelerate.tracking import MLflowTracker

        tracked, known = self.tracked, self.record.id or None
        mlflow.end_run()  # of a start that raised halfway
        self.tracker = _on_this_rank(MLflowTracker(tracked.project, run_id=known, run_name=tracked.name))
        self.tracker.start()
        self.record.name_it(self.tracker.tracker.info.run_id)
        if self.record.fresh:  # a parameter can't be changed
            self.tracker.store_init_configuration({key: str(value) for key, value in tracked.settings.items()})
        mlflow.log_text(tracked.settings_text, "config.yaml")

    def send_clip(self, event: HeardClip) -> None:
        """Send a clip's sound, which `samples/` of the run directory holds, and its spectrogram."""
        import mlflow

        folder = folder_name(event.samples)
        path = sound_file(self.tracked.run, event.key, event.samples)
        mlflow.log_image(event.picture, key=event.key, step=event.samples, synchronous=True)
        mlflow.log_artifact(str(path), f"sounds/{folder}")


class TrackioSink(_FirstOnly):
    """Trackio: its own folder in the user's cache (TRACKIO_DIR), or the server or Space that its variables name."""

    name = "trackio"

    def start(self) -> None:
        """Go on with the run, which Trackio knows by its name."""
        import trackio
        import trackio.run  # noqa: F401 (it prints)
        from accelerate.tracking import TrackioTracker

        for module in ("trackio", "trackio.run", "trackio.utils"):
            vars(sys.modules[module])["print"] = _silent  # standard output is for a command's own tables
        tracked = self.tracked
        self.tracker = TrackioTracker(
            tracked.project,
            name=f"{tracked.name}.{self.record.name_it()}",
            group=tracked.name,
            config=tracked.settings,
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        self.tracker.start()

    def send_clip(self, event: HeardClip) -> None:
        """Send a clip's sound and spectrogram."""
        import trackio

        audio_S = (event.audio_S * 32767).round().astype(np.int16)
        values = {
            f"sounds/{event.key}": trackio.Audio(audio_S, sample_rate=event.sample_rate),
            f"spectrograms/{event.key}": trackio.Image(event.picture),
        }
        self.tracker.log(values, step=event.samples)


def sound_file(run: RunDirectory, name: str, samples: int) -> Path:
    """Return the path of a listening sample in the run directory."""
    return run.samples / folder_name(samples) / f"{name.replace('/', '.')}.flac"


def _has_wandb_key() -> bool:
    """Whether W&B finds a key without asking for one, which it does on a terminal."""
    from requests.utils import get_netrc_auth

    server = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    return "WANDB_API_KEY" in os.environ or get_netrc_auth(server) is not None


def _end_wandb() -> None:
    """End the process that W&B writes and sends with, once it has written everything."""
    import wandb

    wandb.teardown()


def _on_this_rank(tracker: Any) -> Any:
    """Return one of Accelerate's trackers that does not ask which rank this is: only rank 0 has trackers."""
    tracker.main_process_only = False
    return tracker


def _silent(*words: object, **options: object) -> None:
    """Take the place of `print`."""
