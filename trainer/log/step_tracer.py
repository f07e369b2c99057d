"""Traces a few steps of a training when somebody asks for it, without ending the training. On rank 0."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace

import torch
from torch.profiler import record_function

from trainer.checkpoints.names import folder_name
from trainer.log.step_trace import StepTrace
from trainer.log.trace_request import (
    TraceRequest,
    read_request,
    remove_request,
    table_beside,
    trace_path,
    traces,
    write_request,
)
from trainer.ranks.watchdog import Watchdog
from trainer.run_directory import RunDirectory

logger = logging.getLogger(__name__)

_SETTLED_AFTER = 3  # steps of a new training after which compilation and the first allocations are over
_NOTHING = nullcontext()


class StepTracer:
    """Waits for a request (`trainer.log.trace_request`), then traces and writes. All ranks have one; rank 0's acts.

    A step that is not traced costs two comparisons here, and no range: even without a profiler, torch's
    `record_function` takes as long as a few small operations. Whatever fails is logged, and ends no training.
    """

    def __init__(
        self, run: RunDirectory, device: torch.device, watchdog: Watchdog, *, main: bool, at_start: int
    ) -> None:
        """`at_start` steps are traced soon after the start, unless the stage has a trace already; 0: none are."""
        self.run, self.device, self.watchdog, self.main = run, device, watchdog, main
        self._request: TraceRequest | None = None
        self._trace: StepTrace | None = None
        self._steps_to_go = _SETTLED_AFTER
        if main and at_start and not traces(run.path):
            self._request = TraceRequest(steps=at_start, asked=0.0)

    def range(self, name: str) -> AbstractContextManager[object]:
        """Return a context whose work the trace shows under a name, see `kernel_table.STEP_PARTS`."""
        return _NOTHING if self._trace is None else record_function(name)

    def look(self) -> None:
        """Look whether a trace is asked for. This reads the file system, so it is called with each line of the log."""
        if self.main and self._request is None:
            self._guard(self._accept)

    def step_ended(self, samples: int) -> None:
        """Mark the boundary between two steps.

        Args:
            samples: samples seen so far.
        """
        if self._trace is not None:
            self._guard(lambda: self._go_on(samples))
        elif self._request is not None:
            self._steps_to_go -= 1
            if self._steps_to_go <= 0:
                self._guard(self._begin)

    def close(self) -> None:
        """Give up a trace that is not complete, and remove a request that nobody will answer any more."""
        if not self.main:
            return
        if self._trace is not None:
            logger.info("%s: the trace of its steps is given up, because the training ends", self.run.stage)
        self._reset()

    def _accept(self) -> None:
        self._request = read_request(self.run.path)
        self._steps_to_go = 0

    def _begin(self) -> None:
        assert self._request is not None
        self._trace = StepTrace(self.device, self._request.steps)
        self._note(0)

    def _go_on(self, samples: int) -> None:
        assert self._trace is not None
        self._trace.step_ended(samples)
        self._note(max(0, self._trace.traced))
        if not self._trace.complete:
            return
        with self.watchdog.allow_longer():
            self._write(self._trace)
        self._reset()

    def _write(self, trace: StepTrace) -> None:
        self.run.require_ownership()
        path = trace_path(self.run.path, folder_name(trace.samples))
        where = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        heading = f"{self.run.stage}: {trace.steps} step(s) after {trace.samples} samples, rank 0, {where}"
        trace.write(path, table_beside(path), heading=heading)
        logger.info("%s: traced %d step(s) to %s", self.run.stage, trace.steps, path)

    def _note(self, traced: int) -> None:
        """Note in a request by command how far the trace is."""
        if self._request is not None and self._request.asked:
            write_request(self.run.path, replace(self._request, traced=traced))

    def _guard(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            logger.warning("%s: no trace of its steps is made: %s", self.run.stage, error)
            self._reset()

    def _reset(self) -> None:
        trace, self._trace, self._request = self._trace, None, None
        with suppress(Exception):  # a profiler that has failed may fail again; a request may be on a disk that is away
            remove_request(self.run.path)
        if trace is not None:
            with suppress(Exception):
                trace.stop()
