"""The held-out clips that are scored, and their blocks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from trainer.data.shard_set import ShardSet
from trainer.recipes.schema import Config
from trainer.recipes.values import hash_values
from trainer.stage_inputs import held_out_set

_OTHER_SEED = 1_000_003  # decode n of a clip has the seed: row + n · this number


class ScoredClips:
    """Level-normalized held-out clips, whose audio is read on demand. The page's clips come first.

    Attributes: `sample_rate` in Hz, `channels` and `samples` of each clip, `keys`, and `on_page`, the number of clips
    that the page plays.
    """

    def __init__(self, shards: ShardSet, ids: Sequence[int], *, samples: int, on_page: int, device: torch.device):
        self._shards, self._ids, self._device = shards, list(ids), device
        self.sample_rate, self.on_page = shards.info.sample_rate, min(on_page, len(ids))
        self.keys = [f"clip_{id_:05d}" for id_ in ids]
        self.channels = len(shards.audio(self._ids[0]))
        self.samples = self._common(samples)

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def seconds(self) -> float:
        """The length of each clip."""
        return self.samples / self.sample_rate

    @property
    def identity(self) -> str:
        """Identifies the clips, their length, and how many of them the page plays."""
        return hash_values({"set": self._shards.fingerprint, "ids": self._ids, "cut": [self.samples, self.on_page]})

    @property
    def autoencoder(self) -> str:
        """The identity of the AudioAE that encoded the held-out set."""
        return self._shards.info.ae_identity

    def audio(self, rows: Sequence[int]) -> Tensor:
        """Read the clips of these rows: (rows, channels, samples)."""
        audio = [torch.from_numpy(self._shards.audio(self._ids[row]))[:, : self.samples] for row in rows]
        if (shortest := min(clip.shape[1] for clip in audio)) < self.samples:
            self._refuse(shortest)
        return torch.stack(audio).to(self._device)

    @cached_property
    def audio_BCS(self) -> Tensor:
        """All clips, (clips, channels, samples)."""
        return self.audio(range(len(self)))

    def metadata(self, row: int) -> dict[str, Any]:
        """Return the contents of a clip's JSON file."""
        return self._shards.metadata(self._ids[row])

    def blocks(self, size: int) -> list[list[int]]:
        """Split all rows into blocks of `size`.

        The blocks do not depend on the number of parts, so the results of a batch do not either.
        """
        return [list(range(start, min(start + size, len(self)))) for start in range(0, len(self), size)]

    def seeds(self, rows: Sequence[int], take: int = 0) -> list[int]:
        """Return the seed of each clip, which differs between takes."""
        return [row + take * _OTHER_SEED for row in rows]

    def _common(self, samples: int) -> int:
        """Return the common length in samples: `samples`, or less if all clips are equally short.

        Raises:
            ValueError: some clips are shorter than `samples` and others are longer than these.
        """
        frames = self._shards.index["frames"][self._ids]
        shortest, longest = (
            self._shards.audio(self._ids[int(at)]).shape[1] for at in (frames.argmin(), frames.argmax())
        )
        if shortest < min(samples, longest):
            self._refuse(shortest)
        return min(samples, shortest)

    def _refuse(self, shortest: int) -> None:
        seconds = shortest / self.sample_rate
        raise ValueError(
            f"{self._shards.location} has a clip of only {seconds:.2f} s: set evaluate.seconds to {seconds:.2f} or less"
        )


def load_clips(config: Config, device: torch.device) -> ScoredClips:
    """Choose clips evenly from the held-out set; the page's clips, also spread evenly, come first.

    Raises:
        ValueError: there are fewer than two, or some are shorter than `evaluate.seconds`.
    """
    shards = held_out_set(config)
    count = min(config.evaluate.clips or len(shards), len(shards))
    if count < 2:
        raise ValueError(
            f"{shards.location} holds {len(shards)} clip(s), at least 2 are needed: raise data.holdout or add sounds"
        )
    ids = [round(index * (len(shards) - 1) / (count - 1)) for index in range(count)]
    of_page = ids[:: max(1, count // config.evaluate.page_clips)][: config.evaluate.page_clips]
    ids = of_page + [id_ for id_ in ids if id_ not in of_page]
    samples = round((config.evaluate.seconds or config.data.clip_seconds) * shards.info.sample_rate)
    return ScoredClips(shards, ids, samples=samples, on_page=len(of_page), device=device)
