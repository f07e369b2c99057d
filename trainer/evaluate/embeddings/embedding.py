"""The interface of an embedding: audio → vectors, with the name under which figures over them are shown."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor


class Embedding(ABC):
    """Turns audio into vectors that are close to each other if the audio is similar."""

    name: str
    """The name to show with every figure over this embedding."""
    note: str
    identity: str
    """Identifies the embedding: results over another one are never used in its place."""

    @abstractmethod
    def __call__(self, audio_1S: Tensor, sample_rate: int) -> Tensor:
        """Embed one clip (1, samples): (windows, dim), float32 on the CPU."""
