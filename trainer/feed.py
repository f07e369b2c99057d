"""The micro batches of a training run, read from the data that its config names."""

from __future__ import annotations

import itertools
import time
from collections.abc import Generator, Iterator
from pathlib import Path

from trainer.data.stream import Batch, LatentStream, Shuffle
from trainer.ranks.parallel import Parallel
from trainer.recipes.schema import Config, TrainConfig
from trainer.stage_inputs import training_sets
from trainer.stop import Stop
from trainer.tasks import Task


class Feed:
    """Reads this rank's micro batches from any position of the stream."""

    def __init__(
        self, config: Config, settings: TrainConfig, parallel: Parallel, *, errors: Path, stop: Stop | None = None
    ) -> None:
        data = config.data
        self.stop = stop or Stop()
        self.gave_up = False
        """Whether this rank was asked to stop while it waited for a batch. The step of that batch is then void."""
        self.parallel, self.readers = parallel, data.readers
        self.parts = parallel.micro_batches(settings.global_batch)
        """Micro batches per global batch on this rank."""
        self.stream = LatentStream(
            training_sets(config),
            crop_frames=settings.crop_frames,
            global_batch=settings.global_batch,
            seed=config.seed,
            shuffle=Shuffle(data.shuffle, data.block, data.window, data.window_mib, data.lanes),
            buckets=data.buckets,
            errors=errors,
            max_damaged=data.max_damaged,
        )
        self.waited = 0.0
        """Seconds spent waiting for batches since the log last reset this value."""
        self._batches: Generator[Batch | None] | None = None

    def require(self, task: Task) -> None:
        """Check the latents against the task's autoencoder, and read those of the task's conditions that the sets hold.

        Raises:
            ValueError: the latents were made by another autoencoder, or a condition does not fit the task's D.
        """
        made_by, ours = self.stream.sets[0].info.ae_identity, task.autoencoder.identity()
        if made_by != ours:
            raise ValueError(
                f"the latents in {self.stream.sets[0].location} were made by another autoencoder ({made_by[:8]}, not "
                f"{ours[:8]}): prepare them with this recipe's autoencoder, or set `autoencoder` to theirs"
            )
        self.stream.conditions = [reader for reader in task.conditions() if reader.found_in(self.stream.sets)]

    def begin(self, position: int) -> None:
        """Start reading at the global batch that begins at `position`."""
        self.close()
        self.waited = 0.0
        parallel = self.parallel
        self._batches = self.stream.iterate(
            position,
            rank=parallel.rank,
            world_size=parallel.world_size,
            local_ranks=parallel.local_ranks,
            parts=self.parts,
            threads=self.readers,
            give_up=self.stop,
        )

    def next(self) -> Batch:
        """Return the next micro batch; its `x0` is valid until the next call.

        If this rank is asked to stop while it waits, the batch is blank. This rank still has to join the step's
        collectives, because the other ranks wait in them; the last collective tells all ranks that the step is void.
        """
        assert self._batches is not None
        start = time.perf_counter()
        batch = None if self.gave_up else next(self._batches)
        self.waited += time.perf_counter() - start
        if batch is None:
            self.gave_up = True
            return self.stream.blank(self.stream.global_batch // (self.parallel.world_size * self.parts))
        return batch

    def from_the_beginning(self, *, whole: bool = False) -> Iterator[Batch]:
        """Yield the global batches from position 0 on: this rank's share of each, or with `whole` all of its samples.

        These reads do not affect the batches that `next` returns.
        """
        rank, world_size = (0, 1) if whole else (self.parallel.rank, self.parallel.world_size)
        for step in itertools.count():
            yield self.stream.batch(step * self.stream.global_batch, rank=rank, world_size=world_size)

    def samples_at(self, position: int) -> dict[str, list[int]]:
        """Return the ids of the samples in the whole global batch at `position`, by the location of their set."""
        ids: dict[str, list[int]] = {}
        for number, id_ in self.stream.planned(position):
            ids.setdefault(self.stream.sets[number].location, []).append(id_)
        return ids

    def close(self) -> None:
        """Stop the threads that read ahead."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None
