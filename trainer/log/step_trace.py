"""A trace of some steps by torch's profiler, written as a file for Perfetto or chrome://tracing."""

from __future__ import annotations

import gzip
import shutil
import tempfile
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from models.atomic_write import replacing, write_whole
from trainer.log.kernel_table import kernel_table

_LEVEL = 5  # of gzip; its default, 9, takes several times as long for a few percent


class StepTrace:
    """Records from its construction on: one step that warms the profiler up and is left out, then the traced steps."""

    def __init__(self, device: torch.device, steps: int) -> None:
        self.steps, self.traced, self.samples = steps, -1, 0
        self._on_device = device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_device else [])]
        self._profiler = profile(activities=activities, schedule=schedule(wait=0, warmup=1, active=steps, repeat=1))
        self._profiler.start()

    @property
    def complete(self) -> bool:
        """Whether all steps are traced."""
        return self.traced == self.steps

    def step_ended(self, samples: int) -> None:
        """Mark the boundary between two steps. After the last one, the device is waited for.

        Args:
            samples: samples seen so far.
        """
        self._profiler.step()
        self.traced += 1
        if self.traced == 0:
            self.samples = samples

    def write(self, trace: Path, table: Path, *, heading: str) -> None:
        """Write the trace and the table of its costliest kernels, below a heading; each appears whole or not at all."""
        kernels = kernel_table(self._profiler.key_averages(), steps=self.steps, on_device=self._on_device)
        write_whole(table, f"{heading}\n\n{kernels}")
        # Uncompressed, a trace may have a gigabyte, which a local disk takes faster than a shared one.
        with tempfile.TemporaryDirectory() as folder:
            plain = Path(folder) / "trace.json"
            self._profiler.export_chrome_trace(str(plain))
            with (
                replacing(trace) as partial,
                plain.open("rb") as source,
                gzip.open(partial, "wb", compresslevel=_LEVEL) as packed,
            ):
                shutil.copyfileobj(source, packed, 1 << 20)

    def stop(self) -> None:
        """Stop recording. What was recorded of an incomplete trace is lost."""
        self._profiler.stop()
