"""Asked to leave: what a launcher tells the loop, and how work that takes longer than a step is given up."""

from __future__ import annotations


class Stop:
    """Whether to leave, and whether there is time for something before. This one never asks to."""

    def __call__(self) -> bool:
        """Whether this rank was asked to leave."""
        return False

    def step_begins(self, samples: int) -> None:
        """Hear that a step begins after so many samples. A launcher need not listen."""

    def hurried(self, seconds: float) -> bool:
        """Whether something that takes so long would not fit into the time that is left."""
        return False


class Leaving(Exception):  # no error
    """Raised on all ranks alike, between the parts of an evaluation, when one of them was asked to leave."""
