"""A micro batch's forward and backward pass as CUDA graphs, which are recorded once and then replayed.

A pass of few clips takes the host longer to launch, kernel by kernel, than the device to compute. A CUDA graph is
launched at once. It repeats the recorded kernels with the same arguments, so that what they read and write has to stay
where it is: the inputs, the weights, the gradients.

Forward and backward pass are two graphs, because between them the caller weights the losses and starts a collective.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from trainer.inputs import Inputs
from trainer.losses import Losses
from trainer.ranks.flat_gradients import FlatGradients
from trainer.recipes.parallel import ParallelConfig

logger = logging.getLogger(__name__)

_SHAPES = 8
"""Shapes of micro batches that are recorded. Each takes seconds to record, and memory for some thousand kernels."""
_REHEARSALS = 3
"""Passes before a recording, in which libraries compile, choose and load kernels, and allocate workspaces."""

Result = TypeVar("Result")
Key = tuple[tuple[str, torch.Size, torch.dtype], ...]


class Recorder(Protocol):
    """Records what a device does."""

    def rehearse(self, work: Callable[[], object]) -> None:
        """Do work as it will be done when it is recorded."""

    def record(self, work: Callable[[], Result]) -> tuple[Result, Callable[[], None]]:
        """Record work, and return its result and a function that repeats it on the device.

        The result has no values until the first repetition. Each repetition overwrites it, and may overwrite the
        results of other recordings: copy what is needed for longer.
        """


class CudaRecorder:
    """Records CUDA graphs, which share one pool of memory: each may overwrite what others left there."""

    def __init__(self, device: torch.device) -> None:
        # Autograd runs a backward pass on the stream of its forward pass, which for a recording must not be the default
        # one. Rehearsals use the same stream, so that its workspaces exist before they are recorded.
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def rehearse(self, work: Callable[[], object]) -> None:
        """See `Recorder`."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            work()
        torch.cuda.current_stream().wait_stream(self.stream)

    def record(self, work: Callable[[], Result]) -> tuple[Result, Callable[[], None]]:
        """See `Recorder`."""
        graph = torch.cuda.CUDAGraph()
        # The outer `with` restores the stream if the recording fails, which the inner one then does not. What other
        # threads ask of CUDA meanwhile, such as the saver, does not count ("thread_local").
        with (
            torch.cuda.stream(self.stream),
            torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"),
        ):
            result = work()
        return result, graph.replay


def require_cuda(config: ParallelConfig, device: torch.device) -> None:
    """Raise ValueError if the recipe wants CUDA graphs, and this rank has no CUDA device."""
    if config.graph and device.type != "cuda":
        raise ValueError("parallel.graph=true, but torch finds no CUDA device here: remove parallel.graph")


class MicroBatchGraphs:
    """Computes micro batches by replaying their passes, one recording for each shape of inputs.

    The passes of further shapes, and of those that memory is missing for, are computed without a recording. All passes
    give the same numbers, and add to the same gradients.
    """

    def __init__(
        self,
        computed: nn.Module,
        gradients: FlatGradients,
        recorder: Recorder,
        *,
        shapes: int = _SHAPES,
    ) -> None:
        """`computed` maps `Inputs` to the fields of `Losses`, without a state of its own; `shapes` are recorded."""
        self.computed, self.gradients, self.recorder, self.shapes = computed, gradients, recorder, shapes
        self.recorded: dict[Key, _Recorded | None] = {}
        """The recordings by shape; None where memory was missing."""
        self._read = [*computed.parameters(), *computed.buffers()]
        self._places: list[int] = []
        self._current: _Pass | _Recorded | None = None
        self._terms: list[Tensor] = []

    def forward(self, inputs: Inputs) -> Losses:
        """Compute the losses of a micro batch. Gradients with respect to them go to `backward`."""
        self._forget_if_moved()
        self._current = self._recording(inputs) or _Pass(self.computed, self.gradients, inputs)
        losses = self._current.forward(inputs)
        # The clones outlive the next replay. As leaves they keep no part of the module's autograd graph alive, whose
        # nodes a later recording would otherwise meet on another stream.
        terms = {name: value.clone().requires_grad_() for name, value in losses.terms.items()}
        self._terms = list(terms.values())
        return Losses(terms, losses.quantiles.clone())

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss () that was computed from what the last `forward` returned."""
        assert self._current is not None, "a backward pass has to follow its forward pass"
        current, self._current = self._current, None
        current.backward(torch.autograd.grad(loss, self._terms))

    def forget(self) -> None:
        """Drop all recordings and the memory that they hold."""
        self.recorded, self._current, self._terms = {}, None, []

    def _forget_if_moved(self) -> None:
        """Drop all recordings if a weight has another place in memory than when they were made."""
        places = [value.data_ptr() for value in self._read]
        if self.recorded and places != self._places:
            logger.info("weights have moved in memory: micro batches are recorded anew")
            self.forget()
        self._places = places

    def _recording(self, inputs: Inputs) -> _Recorded | None:
        """Return the recording for inputs of this shape; make it now if it is missing and there is room for one more.

        Raises:
            ValueError: the pass cannot be recorded.
        """
        key = tuple((name, value.shape, value.dtype) for name, value in inputs.named().items())
        if key not in self.recorded and len(self.recorded) < self.shapes:
            self.recorded[key] = self._record(inputs)
        return self.recorded.get(key)

    def _record(self, inputs: Inputs) -> _Recorded | None:
        shape = "×".join(map(str, inputs.x0.shape))
        rehearsed = _Rehearsed(self.computed, self.gradients, inputs, self.recorder)
        try:
            recorded = _Recorded(rehearsed, self.recorder)
        except RuntimeError as error:
            causes = _causes(error)
            if not any(isinstance(cause, torch.OutOfMemoryError) for cause in causes):
                # torch leaves its allocator in a state that nothing is promised of: going on is not safe.
                reason = str(causes[-1]).strip().partition("\n")[0]
                raise ValueError(
                    f"parallel.graph=true: a micro batch of shape {shape} cannot be recorded as a CUDA graph "
                    f"({reason}): set parallel.graph=false"
                ) from error
            logger.warning("too little memory to record micro batches of shape %s: they run without CUDA graphs", shape)
            return None
        logger.info("micro batches of shape %s are CUDA graphs", shape)
        return recorded


class _Pass:
    """A forward and a backward pass on the inputs given to it."""

    def __init__(self, computed: nn.Module, gradients: FlatGradients, inputs: Inputs) -> None:
        self.computed, self.gradients, self.inputs = computed, gradients, inputs
        self.with_gradient: list[int] = []
        """The indices of the parameters that have a gradient, known after a backward pass."""
        self._terms: list[Tensor] = []

    def forward(self, _: Inputs | None = None) -> Losses:
        terms, quantiles = self.computed(self.inputs)
        self._terms = list(terms.values())
        return Losses({name: value.detach() for name, value in terms.items()}, quantiles.detach())

    def backward(self, of_terms: Sequence[Tensor]) -> None:
        self.with_gradient = self.gradients.add(self.differentiate(of_terms))

    def differentiate(self, of_terms: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Return the gradient of each parameter, from the gradients of the terms. The autograd graph is freed."""
        terms, self._terms = self._terms, []
        return torch.autograd.grad(terms, self.gradients.parameters, of_terms, allow_unused=True)


class _Rehearsed(_Pass):
    """A pass on inputs of its own, ready to be recorded. Rehearsals leave the gradients as they are."""

    def __init__(self, computed: nn.Module, gradients: FlatGradients, inputs: Inputs, recorder: Recorder) -> None:
        super().__init__(computed, gradients, inputs.changed(torch.clone))
        for _ in range(_REHEARSALS):
            recorder.rehearse(self._once)

    def _once(self) -> None:
        self.differentiate([torch.ones_like(value) for value in self.forward().terms.values()])


class _Recorded:
    """A pass that is replayed. It must not be interleaved with that of another recording."""

    def __init__(self, rehearsed: _Rehearsed, recorder: Recorder) -> None:
        self._inputs = rehearsed.inputs.named()
        self._losses, self._replay_forward = recorder.record(rehearsed.forward)
        self._of_terms = [torch.zeros_like(value) for value in self._losses.terms.values()]
        _, self._replay_backward = recorder.record(partial(rehearsed.backward, self._of_terms))
        self._gradients, self._with_gradient = rehearsed.gradients, rehearsed.with_gradient

    def forward(self, inputs: Inputs) -> Losses:
        """Return losses that the next replay of any recording overwrites."""
        for name, value in inputs.named().items():
            self._inputs[name].copy_(value)
        self._replay_forward()
        return self._losses

    def backward(self, of_terms: Sequence[Tensor]) -> None:
        for buffer, value in zip(self._of_terms, of_terms, strict=True):
            buffer.copy_(value)
        self._replay_backward()
        self._gradients.show(self._with_gradient)


def _causes(error: BaseException) -> list[BaseException]:
    """Return an error and those during whose handling it came up, the first of all last."""
    causes = [error]
    while (before := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(before)
    return causes
