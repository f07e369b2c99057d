"""The interface of a system under test: anything that turns the held-out clips into audio, block by block."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from trainer.evaluate.systems import System


@dataclasses.dataclass
class Decoded:
    """The audio that a system made from one block of clips."""

    system: System
    """The system's row, with everything that decoding has shown about the system."""
    takes: list[Tensor]
    """(clips, channels, samples) each: first one decode of every clip in the block, then further decodes of the page's
    clips only. The list is empty if the system is not available."""
    denoising: Tensor | None = None
    """D's denoising error of each clip, (clips,); None for systems that do not use D."""
    payload_bits: list[int] = dataclasses.field(default_factory=list)
    file_bytes: list[int] = dataclasses.field(default_factory=list)
    coded_bits: list[int] = dataclasses.field(default_factory=list)
    failures: dict[int, str] = dataclasses.field(default_factory=dict)
    """Error messages by row. The audio that `takes` holds for these rows is ignored."""


class SystemUnderTest(ABC):
    """A system that can be scored. Nothing is loaded before the first `decode`."""

    key: str
    identity: str
    """Identifies everything that the decodes depend on, except the clips."""
    control_of: str = ""
    """If this is the control of another system (the same, decoded from another clip's z): that system's key."""

    @abstractmethod
    def decode(self, rows: Sequence[int]) -> Decoded:
        """Decode the clips of a block, given by their rows."""

    def retry(self) -> bool:
        """Whether a system that was unavailable before can be loaded now."""
        return False

    def unload(self) -> None:  # noqa: B027 (most systems hold nothing)
        """Free the memory of models and caches."""
