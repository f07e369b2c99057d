"""Detects training steps that would harm the weights, and decides alike on every rank what to do about them.

A step whose loss or gradient norm is not finite, or whose norm is far above the recent median, is skipped: its samples
count as seen, and the weights do not change. After several consecutive skipped steps, the run is rewound to the last
good checkpoint and skips the data seen since then. These decisions depend only on numbers that all ranks share and on
state that every checkpoint stores, so a run that is killed in between and resumed gives the same result.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

from trainer.ranks.gate import NO_LIMIT
from trainer.recipes.schema import HealthConfig

_SCALE_GROWS_AFTER = 2000  # accepted steps; the default of torch's GradScaler
_LARGEST_SCALE = 2.0**24


class Health:
    """Says which steps are taken, and maintains the loss scale of fp16."""

    def __init__(self, settings: HealthConfig, *, scaled: bool) -> None:
        """`scaled`: the loss is scaled, for fp16. An overflow then lowers the scale and does not count as a fault."""
        self.settings, self.scaled = settings, scaled
        self.norms: deque[float] = deque(maxlen=settings.spike_window)
        self.skipped: list[dict[str, Any]] = []
        """The consecutive skipped steps up to now: samples before the step, loss, norm, reason."""
        self.rewinds = 0
        """How many times the run was rewound."""
        self.scale = 2.0**16 if scaled else 1.0
        self._steps_at_scale = 0

    def largest_norm(self) -> float:
        """Return the largest gradient norm with which the next step is taken."""
        known = len(self.norms) >= max(1, self.settings.spike_window // 4)
        usual = statistics.median(self.norms) if known else 0.0
        return self.settings.spike * usual or NO_LIMIT

    def record(self, samples: int, loss: float, norm: float) -> bool:
        """Record the next step, and return whether the optimizer took it: whether its `Gate` was open.

        Args:
            samples: samples seen before the step.
            loss: the mean loss of the global batch.
            norm: the gradient norm of the global batch, before clipping.
        """
        taken = not (self.scaled and self._overflowed(loss, norm))
        if taken and (why := self._fault(loss, norm)):
            taken = False
            self.skipped.append({"samples": samples, "loss": str(loss), "grad_norm": str(norm), "why": why})
        elif taken:
            self.norms.append(norm)
            self.skipped.clear()
        return taken

    @property
    def good(self) -> bool:
        """Whether the last step had no fault, so that a run may be rewound to a checkpoint that is saved now."""
        return not self.skipped

    @property
    def hopeless(self) -> bool:
        """Whether `health.rewind_after` consecutive steps were skipped, so that the run must be rewound."""
        return len(self.skipped) >= self.settings.rewind_after

    def rewound(self, rewinds: int) -> None:
        """Record that the run was rewound; it had been rewound `rewinds` times before."""
        self.skipped.clear()
        self.rewinds = rewinds + 1

    def state(self) -> dict[str, Any]:
        """Return the state that a checkpoint stores."""
        return {
            "norms": list(self.norms),
            "skipped": list(self.skipped),
            "rewinds": self.rewinds,
            "scaled": self.scaled,
            "scale": self.scale,
            "steps_at_scale": self._steps_at_scale,
        }

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Restore a checkpoint's state. Its precision may differ; None, from an older version, changes nothing."""
        if state is None:
            return
        self.norms = deque(state["norms"], maxlen=self.settings.spike_window)
        self.skipped, self.rewinds = list(state["skipped"]), state["rewinds"]
        if self.scaled and state.get("scaled"):
            self.scale, self._steps_at_scale = state["scale"], state["steps_at_scale"]

    def _fault(self, loss: float, norm: float) -> str | None:
        if not math.isfinite(loss):
            return "the loss is not finite"
        if not math.isfinite(norm):
            return "the gradient is not finite"
        if norm > self.largest_norm():
            return f"the gradient norm is {norm / statistics.median(self.norms):.0f} times its median"
        return None

    def _overflowed(self, loss: float, norm: float) -> bool:
        """Whether the gradients overflowed in fp16. Halves the scale if so; doubles it after many steps without one."""
        if not math.isfinite(loss) or (not math.isfinite(norm) and self.scale <= 1):
            return False
        if not math.isfinite(norm):
            self.scale, self._steps_at_scale = self.scale / 2, 0
            return True
        self._steps_at_scale += 1
        if self._steps_at_scale >= _SCALE_GROWS_AFTER:
            self.scale, self._steps_at_scale = min(2 * self.scale, _LARGEST_SCALE), 0
        return False
