"""The log of a training run: metrics, held-out loss, listening samples, incidents."""

from __future__ import annotations

import logging
import secrets
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

from models.documents import DamagedDocument, write_json
from trainer.checkpoints.ema import EMA
from trainer.checkpoints.saver import Saver
from trainer.feed import Feed
from trainer.health import Health
from trainer.log.held_out import HeldOutLoss, ListeningClips
from trainer.log.metrics import LossSum, LossSums, Metrics, mean_loss, read_metrics
from trainer.log.throughput import Throughput
from trainer.log.timing import StepClock, compared
from trainer.log.trackers.fan_out import open_trackers
from trainer.log.watched_z import WatchedZ
from trainer.progress import Progress
from trainer.ranks import collective
from trainer.ranks.parallel import Parallel
from trainer.ranks.strategy import Strategy
from trainer.recipes.schema import Config
from trainer.run_directory import RunDirectory
from trainer.run_documents import Incident, read_optional
from trainer.stop import Stop, StopRequested
from trainer.tasks import Task

logger = logging.getLogger(__name__)


class TrainingLog:
    """Collects the log's values on all ranks, and writes them on rank 0."""

    def __init__(
        self,
        config: Config,
        run: RunDirectory,
        task: Task,
        strategy: Strategy,
        ema: EMA,
        parallel: Parallel,
        stop: Stop,
    ) -> None:
        self.config, self.run, self.task, self.parallel, self.stop = config, run, task, parallel, stop
        self.strategy, self.ema = strategy, ema
        self.settings = config.stage(task.stage)
        self.clock = StepClock(parallel.device)
        self.losses = LossSums(config.log.bins, parallel.device)
        self.clips = ListeningClips(config, self.settings, parallel.device)
        self.held_out = HeldOutLoss(config, self.settings, parallel, task.module.draws)
        self.watched = WatchedZ(task, self.held_out)
        self.metrics: Metrics | None = None

    def begin(self, samples: int, *, fresh: bool) -> None:
        """Open the metrics at `samples` samples seen, and start the clock. All ranks."""
        if self.parallel.main:
            self.throughput = Throughput(
                self.config, self.task.stage, ranks=self.parallel.world_size, device=self.parallel.device
            )
            self.metrics = Metrics(self.run, resumed_at=samples, sample_rate=self.task.autoencoder.sample_rate)
            self.metrics.trackers = open_trackers(self.config, self.run, resumed_at=samples)
            if fresh:
                for name, audio in self.clips.originals(self.task):
                    self.metrics.listen(name, audio, 0)
        self.progress.to(samples)
        self.clock.restart()

    def line(self, samples: int, *, lr: float, grad_norm: float, feed: Feed, saver: Saver) -> None:
        """Write a line of the log with the means since the last line. All ranks."""
        of_ranks = collective.gather((self.losses.read(), self.clock.read(feed.waited)))
        feed.waited = 0.0
        loss, by_bin, terms = mean_loss([LossSum(*losses) for losses, _ in of_ranks])
        times = compared([times for _, times in of_ranks])
        seconds = times["step_seconds"][1] / self.settings.global_batch
        if self.metrics is not None:
            self.metrics.write(
                "train",
                samples,
                loss=loss,
                loss_bins=by_bin,
                loss_terms=terms,
                lr=lr,
                grad_norm=grad_norm,
                samples_per_second=round(1 / seconds, 2),
                **self.throughput.of(1 / seconds),
                data_wait=round(times["data_wait_seconds"][1] / max(times["step_seconds"][1], 1e-9), 4),
                save_stall_seconds=round(saver.waited_seconds, 4),
                peak_gib=round(self.parallel.memory()[0] / 2**30, 3),
                **times,
            )
            self.run.write_status(
                "running",
                samples=samples,
                of=self.settings.samples,
                loss=loss,
                save_seconds=round(saver.write_seconds, 2),
            )
            for slow in times["slow_ranks"]:
                logger.warning(
                    "rank %(rank)d on %(host)s is slow: its own work takes %(own).3f s per step, of which it waits "
                    "%(data_wait).3f s for data; the median over ranks is {:.3f} s".format(times["own_seconds"][1]),
                    slow,
                )
        self.progress.to(min(samples, self.settings.samples), loss=f"{loss:.4f}")

    def measure(self, samples: int, *, kind: str = "held_out", **facts: float) -> float | None:
        """Measure the averaged weights' loss and z on held-out clips; return the loss. All ranks.

        `kind` is that of the line in the metrics, to which `facts` are added. The result is None if the run is asked to
        stop first.
        """
        try:
            with self.ema.applied():
                loss = self.held_out(self.strategy, self._between)
                of_z = self.watched(self.strategy, self._between)
        except StopRequested:
            return None
        if self.metrics is not None:
            self.metrics.write(kind, samples, loss=loss, **of_z, **facts)
        return loss

    def has_line(self, kind: str, samples: int) -> bool:
        """Whether the metrics have a line of this kind at `samples`. On rank 0."""
        assert self.metrics is not None
        return any(line["kind"] == kind and line["samples"] == samples for line in read_metrics(self.metrics.path))

    def listen(self, samples: int) -> bool:
        """Decode a few held-out clips with the averaged weights. All ranks. False if the run is asked to stop first."""
        try:
            with self.ema.applied():
                decoded = self.clips.decoded(self.task, self.strategy, self._between)
        except StopRequested:
            return False
        if self.metrics is not None:
            for name, audio in decoded:
                self.metrics.listen(name, audio, samples)
        return True

    def _between(self) -> None:
        """Raise StopRequested on all ranks if any rank was asked to stop."""
        if self.parallel.any(self.stop()):
            raise StopRequested

    def stopped(self, samples: int, *, saved: bool, took: float) -> None:
        """Record that the run stops before its end. On rank 0.

        Args:
            samples: samples seen.
            saved: whether a checkpoint was saved at `samples`.
            took: seconds that the last save took.
        """
        self.run.write_status("stopped", samples=samples, of=self.settings.samples, save_seconds=round(took, 2))
        how = "saved" if saved else f"not saved: the last save took {took:.1f} s, and too little time is left"
        logger.info("%s: stopped at %d samples, %s", self.task.stage, samples, how)

    def step(self, samples: int, health: Health, feed: Feed, position: int) -> None:
        """Record a step that was skipped, with the reason and the ids of its samples.

        Args:
            samples: samples seen before the step.
            position: the step's position in the stream.
        """
        if self.parallel.main and not health.good and health.skipped[-1]["samples"] == samples:
            step = health.skipped[-1]
            logger.warning("the step after %(samples)d samples is skipped: %(why)s (loss %(loss)s)", step)
            self._incident("skipped a step", **step, position=position, sample_ids=feed.samples_at(position))

    def went_back(self, samples: int, position: int, health: Health, *, from_: int, to: str) -> None:
        """Record that the run was rewound to an older checkpoint, and remove the later part of the curve. All ranks."""
        self.losses.read()
        self.clock.restart()
        if self.metrics is not None:
            logger.warning(
                "%d consecutive steps were skipped: rewinding from %d samples to %s; the data in between is skipped",
                *(self.config.health.rewind_after, from_, to),
            )
            self._incident("went back", from_samples=from_, samples=samples, position=position, times=health.rewinds)
            self.metrics.go_back_to(samples)
        self.progress.to(samples)

    def _incident(self, what: str, **facts: Any) -> None:
        path = self.run.path / "incident.json"
        try:
            incidents = read_optional(path, list[Incident], mend="it is kept under another name") or []
        except DamagedDocument as error:  # a training does not end for what only informs
            kept = path.rename(path.with_name(f"damaged_{path.name}_{secrets.token_hex(4)}"))
            logger.warning("%s, as %s", error, kept.name)
            incidents = []
        same = [entry for entry in incidents if entry["what"] == what and entry["position"] == facts["position"]]
        if not same:  # A run that is killed and resumed comes to the same incident again.
            now = datetime.now(UTC).isoformat(timespec="seconds")
            write_json(path, [*incidents, {"what": what, "time": now, **facts}], indent=1)

    def __enter__(self) -> Self:
        self.progress = Progress(
            self.task.stage, total=self.settings.samples, unit="clips", shown=self.parallel.main
        ).__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.progress.__exit__(kind, error, traceback)
        if self.metrics is not None:
            self.metrics.close()
