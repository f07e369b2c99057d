"""DDP whose micro batches are CUDA graphs.

torch can record DDP's own backward pass, too. Then NCCL's collectives are part of the graph, each shape takes eleven
passes to warm up and a second recording without collectives for accumulation, and the watchdog of NCCL must not look.
Here the graphs hold the computation alone, and the ranks average the gradients after a step's last micro batch. That
works with every backend, and a rank may go on without graphs while others use them. Its price: the exchange no longer
overlaps with the backward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.inputs import Inputs
from trainer.losses import Losses
from trainer.ranks.flat_gradients import FlatGradients
from trainer.ranks.graph import MicroBatchGraphs, Recorder
from trainer.ranks.strategy import PrecisionModule, Replicated
from trainer.recipes.schema import TrainConfig


class Graphed(Replicated):
    """Every rank holds all weights, replays its micro batches, and averages the gradients with the other ranks."""

    def __init__(
        self,
        computed: PrecisionModule,
        settings: TrainConfig,
        recorder: Recorder,
        *,
        rank: int,
        world_size: int,
        exchanged_in: torch.dtype = torch.float32,
    ) -> None:
        """`computed` must not keep casts of weights (`keeps_casts`), because a recording keeps no part of another."""
        super().__init__(computed, settings, rank=rank, world_size=world_size, exchanged_in=exchanged_in)
        learned = list(self.learned.values())
        self.gradients = FlatGradients(learned, world_size=world_size, exchanged_in=exchanged_in)
        self.graphs = MicroBatchGraphs(computed, self.gradients, recorder)

    def _distribute(self, exchanged_in: torch.dtype) -> None:
        """Use no hooks of DDP."""

    def forward(self, inputs: Inputs) -> Losses:
        """See `Strategy`. Without gradients, as in evaluations, nothing is recorded."""
        return self.graphs.forward(inputs) if torch.is_grad_enabled() else super().forward(inputs)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """See `Strategy`."""
        self.graphs.backward(loss * self.scale)
        if last:
            self.gradients.start_average()

    def _finish_gradients(self) -> None:
        self.gradients.finish_average()

    def _clear_gradients(self) -> None:
        self.gradients.clear()

    def close(self) -> None:
        """See `Strategy`."""
        self.graphs.forget()
