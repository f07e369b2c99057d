"""What a run does about steps that would spoil it, decided alike on every rank.

A step whose loss or gradient norm is not finite, or whose norm is far above what is usual, is skipped: its samples are
counted, the weights stay. After several in a row the run returns to the last good checkpoint and passes over the data
in between. All of it is a function of numbers that all ranks share and of a state that every checkpoint holds, so that
a run that is killed in the middle of it comes out the same.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

from trainer.recipes.schema import HealthConfig

_SCALE_GROWS_AFTER = 2000  # accepted steps, as torch's GradScaler
_LARGEST_SCALE = 2.0**24


class Health:
    """Judges each step, and keeps the loss scale of fp16."""

    def __init__(self, settings: HealthConfig, *, scaled: bool) -> None:
        """`scaled`: the loss is scaled, for fp16; its overflows are no incident, they lower the scale."""
        self.settings, self.scaled = settings, scaled
        self.norms: deque[float] = deque(maxlen=settings.spike_window)
        self.skipped: list[dict[str, Any]] = []
        """The skipped steps in a row up to now: samples before the step, loss, norm, why."""
        self.rewinds = 0
        self.taken = False
        """Whether the last step was taken."""
        self.scale = 2.0**16 if scaled else 1.0
        self._steps_at_scale = 0

    def accepts(self, samples: int, loss: float, norm: float) -> bool:
        """Whether to take the step after `samples`, with this loss and gradient norm of the whole batch."""
        self.taken = not (self.scaled and self._overflowed(loss, norm))
        if self.taken and (why := self._fault(loss, norm)):
            self.taken = False
            self.skipped.append({"samples": samples, "loss": str(loss), "grad_norm": str(norm), "why": why})
        elif self.taken:
            self.norms.append(norm)
            self.skipped.clear()
        return self.taken

    @property
    def good(self) -> bool:
        """Whether the last step was no incident: a checkpoint of now is one to return to."""
        return not self.skipped

    @property
    def hopeless(self) -> bool:
        """Whether so many steps in a row were skipped that the run has to go back."""
        return len(self.skipped) >= self.settings.rewind_after

    def rewound(self, rewinds: int) -> None:
        """The run went back, after so many times before."""
        self.skipped.clear()
        self.rewinds = rewinds + 1

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {
            "norms": list(self.norms),
            "skipped": list(self.skipped),
            "rewinds": self.rewinds,
            "scaled": self.scaled,
            "scale": self.scale,
            "steps_at_scale": self._steps_at_scale,
        }

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Go on from a checkpoint's, which may be of another precision, or of a version that had none."""
        if state is None:
            return
        self.norms = deque(state["norms"], maxlen=self.settings.spike_window)
        self.skipped, self.rewinds = list(state["skipped"]), state["rewinds"]
        if self.scaled and state["scaled"]:
            self.scale, self._steps_at_scale = state["scale"], state["steps_at_scale"]

    def _fault(self, loss: float, norm: float) -> str | None:
        if not math.isfinite(loss):
            return "the loss is not finite"
        if not math.isfinite(norm):
            return "the gradient is not finite"
        known = len(self.norms) >= max(1, self.settings.spike_window // 4)
        usual = statistics.median(self.norms) if known else 0.0
        if self.settings.spike and usual and norm > self.settings.spike * usual:
            return f"the gradient norm is {norm / usual:.0f} times its median"
        return None

    def _overflowed(self, loss: float, norm: float) -> bool:
        """Halve the scale where it was too large, double it where it was small enough for long."""
        if not math.isfinite(loss) or (not math.isfinite(norm) and self.scale <= 1):
            return False
        if not math.isfinite(norm):
            self.scale, self._steps_at_scale = self.scale / 2, 0
            return True
        self._steps_at_scale += 1
        if self._steps_at_scale >= _SCALE_GROWS_AFTER:
            self.scale, self._steps_at_scale = min(2 * self.scale, _LARGEST_SCALE), 0
        return False
