"""Whether all ranks of a job can begin anew: what the first supervisor knows of the others.

This module exchanges nothing and waits for nothing (`launch.slurm.chair` does). It counts who is there, who has ended
and how.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NotRequired, TypedDict

from launch.slurm.attempt import Note
from models.documents import Natural

FAILED, ORDERED, LEFT = "failed", "ordered", "left"
"""How a worker ended: by itself, on order, or for good: it is done, was asked to leave, or found a user's mistake."""
WHOLE, BROKEN = "whole", "broken"


class Ending(TypedDict):
    """What a supervisor says of its worker's end."""

    rank: Natural
    generation: Natural
    kind: str
    note: NotRequired[Note]
    """The worker's own note, or its supervisor's, of a worker that failed."""
    grace: NotRequired[float]
    """Seconds that the other workers get to end by themselves."""


@dataclass
class RollCall:
    """The supervisors of a job, by the ranks of their tasks."""

    count: int
    """Number of ranks; the tasks after them are idle."""
    patience: float
    """Seconds from the first failure until all workers must have ended."""
    generation: int = 0
    endings: dict[int, Ending] = field(default_factory=dict)
    """Those of this generation, by rank."""
    gone: set[int] = field(default_factory=set)
    """Supervisors that have left for good or were lost."""
    deadline: float | None = None
    """When the roll call is over; None as long as no worker has failed."""

    @property
    def failing(self) -> bool:
        """Whether a worker of this generation has failed, so that all others have to end."""
        return self.deadline is not None

    def ended(self, ending: Ending, now: float) -> None:
        """Note the end of a rank's worker; one of an earlier generation does not count."""
        if ending["generation"] != self.generation or ending["rank"] >= self.count:
            return
        if ending["kind"] == LEFT:
            self.gone.add(ending["rank"])
        else:
            self.endings[ending["rank"]] = ending
            if not self.failing:
                self.deadline = now + self.patience

    def lost(self, rank: int) -> None:
        """Note that a supervisor has gone."""
        if rank < self.count:
            self.gone.add(rank)

    def result(self, now: float) -> str | None:
        """Return WHOLE if all workers have ended and all supervisors are there, BROKEN if that can't come true."""
        if self.deadline is None:
            return None
        if self.gone:
            return BROKEN
        if len(self.endings) == self.count:
            return WHOLE
        return BROKEN if now >= self.deadline else None

    def notes(self) -> dict[int, Note]:
        """Return the notes of the workers that failed, by rank."""
        return {rank: ending["note"] for rank, ending in self.endings.items() if "note" in ending}

    def next(self) -> None:
        """Begin the next generation."""
        self.generation += 1
        self.endings, self.deadline = {}, None
