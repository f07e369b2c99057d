"""How a launcher asks training to stop, and the exception that interrupts work that takes longer than a step."""

from __future__ import annotations


class Stop:
    """Says whether to stop, and whether there is time to save first. This default never stops; launchers override."""

    def __call__(self) -> bool:
        """Whether this rank was asked to stop."""
        return False

    def before_step(self, samples: int) -> None:
        """Called before each step, with the samples seen before it."""

    def has_less_than(self, seconds: float) -> bool:
        """Whether less than `seconds` are left until this process is killed."""
        return False


class StopRequested(Exception):  # This is no error.
    """Raised on all ranks together, between the parts of an evaluation, if any rank was asked to stop."""
