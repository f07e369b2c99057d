"""A run's micro batches: what its config says of data, and where in the stream it is."""

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
    """This rank's micro batches, from any position of the stream on."""

    def __init__(
        self, config: Config, settings: TrainConfig, parallel: Parallel, *, errors: Path, stop: Stop | None = None
    ) -> None:
        data = config.data
        self.stop = stop or Stop()
        self.gave_up = False
        """Whether a batch did not come before this rank was asked to leave: the step that it was for is void."""
        self.parallel, self.readers = parallel, data.readers
        self.parts = parallel.parts(settings.global_batch)
        """Micro batches to a global batch on this rank."""
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
        """Seconds spent waiting for batches since the log last asked."""
        self._batches: Generator[Batch | None] | None = None

    def require(self, task: Task) -> None:
        """Read the conditions that the task wants, as far as the sets hold them.

        Raises:
            ValueError: the latents are another autoencoder's than the task's, or a condition does not fit its D.
        """
        made_by, ours = self.stream.sets[0].info.ae_identity, task.autoencoder.identity()
        if made_by != ours:
            raise ValueError(
                f"the latents in {self.stream.sets[0].location} are another autoencoder's ({made_by[:8]}, not "
                f"{ours[:8]}): prepare them with this recipe's, or give that autoencoder"
            )
        self.stream.conditions = [reader for reader in task.conditions() if reader.found_in(self.stream.sets)]

    def begin(self, position: int) -> None:
        """Go on with the global batch that begins there."""
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
        """The next micro batch; it holds until the one after is asked for.

        Where it does not come, and this rank is asked to leave, it is a blank one: the other ranks wait for this one in
        the step's collectives, and come to know in the last that the step is void.
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
        """This rank's part of one global batch after another, or all of it; apart from the training's own."""
        rank, world_size = (0, 1) if whole else (self.parallel.rank, self.parallel.world_size)
        for step in itertools.count():
            yield self.stream.batch(step * self.stream.global_batch, rank=rank, world_size=world_size)

    def samples_at(self, position: int) -> dict[str, list[int]]:
        """The ids of the whole global batch there, by the sets' locations."""
        ids: dict[str, list[int]] = {}
        for number, id_ in self.stream.dealt(position):
            ids.setdefault(self.stream.sets[number].location, []).append(id_)
        return ids

    def close(self) -> None:
        """End the threads that read ahead."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None
