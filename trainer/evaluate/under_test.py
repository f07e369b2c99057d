"""What is scored: anything that makes sounds of the held-out clips, block by block."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from trainer.evaluate.systems import System


@dataclasses.dataclass
class Decoded:
    """What a source made of one block of clips."""

    system: System
    """What is known of it by now."""
    takes: list[Tensor]
    """(clips, 1, samples): a decode of all clips of the block; then further ones, of the page's clips alone. None: the
    system is not available."""
    denoising: Tensor | None = None
    """The error of D alone, (clips,), where D is used."""
    payload_bits: list[int] = dataclasses.field(default_factory=list)
    file_bytes: list[int] = dataclasses.field(default_factory=list)
    coded_bits: list[int] = dataclasses.field(default_factory=list)
    failures: dict[int, str] = dataclasses.field(default_factory=dict)
    """By row, what went wrong: what `takes` holds there counts for nothing."""


class SystemUnderTest(ABC):
    """A system, before it has made anything."""

    key: str
    identity: str
    """Changes with all that its decodes depend on, beside the clips."""
    control_of: str = ""
    """The key of the system whose decodes from another clip's z these are; empty for a row of its own."""

    @abstractmethod
    def decode(self, rows: Sequence[int]) -> Decoded:
        """Of the clips of a block."""

    def retry(self) -> bool:
        """Whether it could be had now, if it could not before."""
        return False

    def unload(self) -> None:  # noqa: B027 (most hold nothing)
        """Let go of what takes memory."""
