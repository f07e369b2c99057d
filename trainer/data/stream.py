"""Batches of random crops: each a pure function of how many samples were seen before it."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count, islice

import numpy as np
import torch
from torch import Tensor

from trainer.data.order import sample_ids
from trainer.data.shards import ShardSet
from trainer.randomness import integers, keys

_AHEAD = 2


@dataclass(frozen=True)
class Batch:
    """A micro-batch of b samples."""

    x0: Tensor
    """(b, C, crop_frames), float32: crops of the samples' latents."""
    positions: Tensor
    """(b,), int64: the samples' places in the stream; all randomness about a sample is keyed by its place."""
    ids: Tensor
    """(b,), int64: the samples' places in the set."""


class LatentStream:
    """The endless stream of a set's samples, epoch after epoch, each epoch in another order.

    Position p of the stream is sample `order(p mod N)` of epoch p div N. The global batch after n samples is positions
    n … n + global_batch - 1, whatever number of ranks and parts it is cut into, so n is all there is to save.
    """

    def __init__(self, shard_set: ShardSet, *, crop_frames: int, global_batch: int, seed: int):
        """Raises ValueError where a crop is longer than the set's shortest clip."""
        shortest = shard_set.shortest_frames
        if not 1 <= crop_frames <= shortest:
            raise ValueError(
                f"crops of {crop_frames} frames don't fit the clips of {shard_set.folder}, {shortest} frames:"
                f" take crops of 1 to {shortest} frames, or prepare longer clips"
            )
        if global_batch < 1:
            raise ValueError(f"the global batch is at least 1, not {global_batch}")
        self.shard_set, self.crop_frames, self.global_batch, self.seed = shard_set, crop_frames, global_batch, seed

    def batch(self, samples_seen: int, *, rank: int = 0, world_size: int = 1, part: int = 0, parts: int = 1) -> Batch:
        """A rank's micro-batch `part` of the global batch after `samples_seen` samples.

        Raises:
            ValueError: the global batch can't be cut into world_size · parts equal micro-batches.
            DamagedSample: a sample of it can't be read.
        """
        if self.global_batch % (world_size * parts):
            raise ValueError(
                f"a global batch of {self.global_batch} can't be cut into {world_size} ranks × {parts} parts:"
                f" make it a multiple of {world_size * parts}"
            )
        size = self.global_batch // (world_size * parts)
        first = samples_seen + (rank * parts + part) * size
        positions = np.arange(first, first + size)
        ids, _ = sample_ids(positions, len(self.shard_set), fingerprint=self.shard_set.fingerprint, seed=self.seed)
        return Batch(self._crops(ids, torch.from_numpy(positions)), torch.from_numpy(positions), torch.from_numpy(ids))

    def iterate(self, samples_seen: int, *, rank: int = 0, world_size: int = 1, parts: int = 1) -> Generator[Batch]:
        """All of a rank's micro-batches from there on, without end, read ahead by one thread.

        The thread ends when the iterator is closed, dropped or raises.
        """

        def read(start: int, part: int) -> Batch:
            return self.batch(start, rank=rank, world_size=world_size, part=part, parts=parts)

        cuts = ((start, part) for start in count(samples_seen, self.global_batch) for part in range(parts))
        with ThreadPoolExecutor(1, "latents") as reader:
            ahead = deque(reader.submit(read, *cut) for cut in islice(cuts, _AHEAD))
            for cut in cuts:
                ahead.append(reader.submit(read, *cut))
                yield ahead.popleft().result()

    def _crops(self, ids: np.ndarray, positions: Tensor) -> Tensor:
        frames = torch.from_numpy(self.shard_set.index["frames"][ids].astype(np.int64))
        starts = integers(keys(self.seed, "crop", positions), frames - self.crop_frames + 1).tolist()
        crops = torch.empty(len(ids), self.shard_set.info.latent_channels, self.crop_frames)
        for crop, latents, start in zip(crops.numpy(), self.shard_set.latents(ids), starts, strict=True):
            crop[:] = latents[:, start : start + self.crop_frames]
        return crops
