"""Micro batches as CUDA graphs: the same numbers as without, for every stage, shape and precision.

Where there is no GPU, a stand-in repeats the recorded work (`recorders.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from tests.trainer.ranks.recorders import RerunningRecorder
from trainer.inputs import Inputs
from trainer.memory.outline import OutlinedModels
from trainer.ranks.flat_gradients import FlatGradients
from trainer.ranks.graph import CudaRecorder, MicroBatchGraphs
from trainer.ranks.graphed import Graphed
from trainer.ranks.strategy import DTYPES, PrecisionModule, Replicated
from trainer.recipes.schema import Config
from trainer.tasks import Task, make_task

STAGES = ("pretrain", "autoencode", "quantize", "prior", "finetune")
QUANTIZER = ("quantizer.kind=residual", "quantizer.books=3", "quantizer.size=32", "quantizer.rates=[3,1]")
TEXT = ("dit.text_width=16", "dit.text_tokens=7")


@pytest.fixture
def of_stage(tiny):
    """Returns a function that makes a stage's task with random weights, always the same."""

    def make(stage: str, *overrides: str) -> tuple[Config, Task]:
        config = tiny(*QUANTIZER, "prior.samples=8", "prior.global_batch=8", "prior.crop_frames=63", *overrides)
        torch.manual_seed(0)
        task = make_task(config, stage, models=OutlinedModels(config, config.dit))
        with torch.no_grad():  # zeros would leave much without a gradient
            for parameter in task.module.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        return config, task

    return make


def strategies(of_stage: Any, stage: str, *overrides: str) -> tuple[Replicated, Graphed]:
    """Put a stage's module under DDP without and with graphs."""
    made: list[Replicated] = []
    for kind in (Replicated, Graphed):
        config, task = of_stage(stage, *overrides)
        computed = PrecisionModule(task.module, torch.device("cpu"), DTYPES[config.parallel.precision])
        recorder = (RerunningRecorder(),) if kind is Graphed else ()
        made.append(kind(computed, config.stage(stage), *recorder, rank=0, world_size=1))
    plain, graphed = made
    assert isinstance(graphed, Graphed)
    return plain, graphed


def batch(strategy: Replicated, number: int, *, clips: int = 4, frames: int = 63, text: bool = False) -> Inputs:
    positions_B = torch.arange(clips) + 100 * number
    generator = torch.Generator().manual_seed(number)
    x0_BCT = torch.randn(clips, 128, frames, generator=generator)
    mask_BT = torch.ones(clips, frames, dtype=torch.bool)
    mask_BT[0, frames - 9 * (1 + number % 3) :] = False
    draws = strategy.computed.module.draws(positions_B)
    text_BNE = torch.randn(clips, 7, 16, generator=generator)
    tokens = {"text": text_BNE, "text_mask": (torch.arange(7) < 3).repeat(clips, 1)}
    inputs = Inputs(x0=x0_BCT, positions=positions_B, mask=mask_BT, conditions=tokens if text else {})
    return inputs.to(torch.device("cpu"), draws)


def gradients(strategy: Replicated) -> dict[str, torch.Tensor | None]:
    return {name: None if value.grad is None else value.grad.clone() for name, value in strategy.learned.items()}


def require_equal(ours: dict[str, torch.Tensor | None], theirs: dict[str, torch.Tensor | None]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert (value is None) == (ours[name] is None), name
        assert value is None or torch.equal(ours[name], value), name


def accumulate(strategy: Replicated, batches: list[Inputs]) -> list[torch.Tensor]:
    found = []
    for number, inputs in enumerate(batches, start=1):
        losses = strategy.forward(inputs)
        strategy.backward(losses.total({}).mean() / len(batches), last=number == len(batches))
        found += [losses.total({}).detach(), losses.quantiles]
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_the_same_losses_and_gradients(of_stage, stage, precision):
    plain, graphed = strategies(of_stage, stage, f"parallel.precision={precision}")
    for step in range(2):
        found = []
        for strategy in (plain, graphed):
            batches = [batch(strategy, 10 * step + number) for number in range(3)]
            losses = accumulate(strategy, batches)
            found.append((losses, gradients(strategy)))
            for value in strategy.learned.values():
                value.grad = None
        graphed.gradients.clear()
        (theirs, their_gradients), (ours, our_gradients) = found
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        require_equal(our_gradients, their_gradients)
        assert any(value is not None and value.abs().sum() > 0 for value in our_gradients.values())


@pytest.mark.parametrize("shapes", [0, 1, 8])
def test_shapes_beyond_the_bound_run_without_graphs_and_give_the_same(of_stage, shapes):
    plain, graphed = strategies(of_stage, "pretrain", *TEXT, "dit.multistream_depth=1")
    graphed.graphs.shapes = shapes
    several = ({}, {"frames": 36}, {"text": True}, {"clips": 2}, {}, {"text": True})
    found = []
    for strategy in (plain, graphed):
        losses = accumulate(strategy, [batch(strategy, number, **of) for number, of in enumerate(several)])
        found.append((losses, gradients(strategy)))
    assert all(torch.equal(a, b) for a, b in zip(found[0][0], found[1][0], strict=True))
    require_equal(found[1][1], found[0][1])
    assert len(graphed.graphs.recorded) == min(shapes, 4)


class Branches(nn.Module):
    """A module that uses one of its parameters only for inputs with a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.masked = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))

    def forward(self, inputs: Inputs) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        weight = self.always if inputs.mask is None else self.always * self.masked
        return {"term": (inputs.x0 * weight).sum((1, 2))}, torch.full((len(inputs.x0),), 0.5)


def test_a_parameter_without_a_gradient_in_a_step_has_none():
    """The optimizer would otherwise let its moments decay."""
    module = Branches()
    gradients = FlatGradients(list(module.parameters()), world_size=1, exchanged_in=torch.float32)
    graphs = MicroBatchGraphs(module, gradients, RerunningRecorder())
    plain = Inputs(x0=torch.ones(2, 4, 3), positions=torch.arange(2))
    masked = Inputs(x0=torch.ones(2, 4, 3), positions=torch.arange(2), mask=torch.ones(2, 3, dtype=torch.bool))
    for step, with_mask in (([plain], 0), ([plain, masked], 1), ([plain, plain], 0), ([masked], 1)):
        for inputs in step:
            graphs.backward(graphs.forward(inputs).total({}).sum())
        assert torch.equal(module.always.grad, torch.full((3,), 8.0 * len(step)))
        assert (module.masked.grad is not None) == with_mask
        assert not with_mask or torch.equal(module.masked.grad, torch.full((3,), 8.0))
        gradients.clear()


def test_losses_outlive_the_next_replay(of_stage):
    _, graphed = strategies(of_stage, "pretrain")
    first = graphed.forward(batch(graphed, 1))
    kept = {name: value.detach().clone() for name, value in first.terms.items()}, first.quantiles.clone()
    graphed.backward(first.total({}).mean(), last=True)
    graphed.forward(batch(graphed, 2))
    assert all(torch.equal(first.terms[name], value) for name, value in kept[0].items())
    assert torch.equal(first.quantiles, kept[1])


def test_the_callers_tensors_are_read_once(of_stage):
    """The stream reuses its buffers for the next batch before a backward pass is over."""
    plain, graphed = strategies(of_stage, "pretrain")
    for strategy in (plain, graphed):
        accumulate(strategy, [batch(strategy, 0)])  # recorded
        losses = strategy.forward(inputs := batch(strategy, 1))
        if strategy is graphed:
            inputs.x0.fill_(float("nan"))
        strategy.backward(losses.total({}).mean(), last=True)
    require_equal(gradients(graphed), gradients(plain))


def test_a_step_is_recorded_once_and_rehearsed_before(of_stage):
    _, graphed = strategies(of_stage, "pretrain")
    recorder = graphed.graphs.recorder
    accumulate(graphed, [batch(graphed, number) for number in range(5)])
    assert (recorder.rehearsals, len(recorder.results), recorder.repetitions) == (3, 2, 10)


def test_an_evaluation_records_nothing(of_stage):
    plain, graphed = strategies(of_stage, "pretrain")
    losses = []
    for strategy in (plain, graphed):
        with strategy.together():
            losses.append(strategy.forward(batch(strategy, 1)).total({}))
    assert torch.equal(*losses)
    assert not losses[1].requires_grad
    assert graphed.graphs.recorded == {}


def test_weights_that_move_are_recorded_anew(of_stage, caplog):
    plain, graphed = strategies(of_stage, "pretrain")
    for strategy in (plain, graphed):
        accumulate(strategy, [batch(strategy, 1)])
        for value in strategy.learned.values():
            value.grad = None
    graphed.gradients.clear()
    before = graphed.graphs.recorded.copy()
    for strategy in (plain, graphed):
        for value in strategy.learned.values():
            value.data = value.data * 2
        with caplog.at_level(logging.INFO):
            accumulate(strategy, [batch(strategy, 2)])
    require_equal(gradients(graphed), gradients(plain))
    assert before.keys() == graphed.graphs.recorded.keys()
    assert list(before.values()) != list(graphed.graphs.recorded.values())
    assert "moved in memory" in caplog.text


class FailingRecorder(RerunningRecorder):
    """Fails at the n-th recording: first in the work, then, as torch does, where the recording ends."""

    def __init__(self, error: Exception, *, at: int) -> None:
        super().__init__()
        self.error, self.left = error, at

    def record(self, work: Any) -> Any:
        self.left -= 1
        if self.left:
            return super().record(work)
        try:
            work()
            raise self.error
        except type(self.error):
            raise RuntimeError("CUDA error: capture invalidated")  # noqa: B904


@pytest.mark.parametrize("at", [1, 2])
def test_without_memory_for_a_graph_the_shape_runs_without(of_stage, at, caplog):
    plain, graphed = strategies(of_stage, "pretrain")
    graphed.graphs.recorder = FailingRecorder(torch.OutOfMemoryError("CUDA out of memory"), at=at)
    with caplog.at_level(logging.WARNING):
        for strategy in (plain, graphed):
            accumulate(strategy, [batch(strategy, number) for number in range(3)])
    require_equal(gradients(graphed), gradients(plain))
    assert list(graphed.graphs.recorded.values()) == [None]
    assert caplog.text.count("too little memory to record micro batches of shape 4×128×63") == 1


def test_what_cannot_be_recorded_ends_with_the_mend(of_stage):
    _, graphed = strategies(of_stage, "pretrain")
    reason = "CUDA error: operation not permitted when stream is capturing\nmore of it"
    graphed.graphs.recorder = FailingRecorder(RuntimeError(reason), at=2)
    told = r"shape 4×128×63 cannot be recorded .*\(CUDA error: operation not .* capturing\): set parallel\.graph=false"
    with pytest.raises(ValueError, match=told) as error:
        graphed.forward(batch(graphed, 1))
    assert "more of it" not in str(error.value)


def test_a_loss_of_an_earlier_pass_is_refused(of_stage):
    """Its activations are overwritten, and its gradients would be those of other clips."""
    _, graphed = strategies(of_stage, "pretrain")
    stale = graphed.forward(batch(graphed, 1)).total({}).mean()
    graphed.forward(batch(graphed, 2))
    with pytest.raises(RuntimeError, match="not have been used"):
        graphed.backward(stale, last=True)


def test_a_closed_strategy_holds_no_graph(of_stage):
    _, graphed = strategies(of_stage, "pretrain")
    accumulate(graphed, [batch(graphed, 1)])
    graphed.close()
    assert graphed.graphs.recorded == {}


@pytest.mark.parametrize("fails", [False, True])
def test_cuda_records_on_one_stream_and_into_one_pool(fails, monkeypatch):
    """Of torch's own functions for CUDA, only the order and the arguments of calls; what they do needs a GPU."""
    entered: list[object] = []

    @contextmanager
    def stream(chosen: object) -> Iterator[None]:
        entered.append(chosen)
        try:
            yield
        finally:
            entered.remove(chosen)

    monkeypatch.setattr(torch.cuda, "stream", stream)
    names = ("Stream", "CUDAGraph", "graph", "graph_pool_handle", "current_stream")
    with ExitStack() as patched:
        fakes = {name: patched.enter_context(mock.patch.object(torch.cuda, name, autospec=True)) for name in names}
        graph, ours = fakes["graph"], fakes["Stream"].return_value
        if fails:
            graph.return_value.__exit__.side_effect = RuntimeError("capture invalidated")
        else:
            graph.return_value.__exit__.return_value = None
        recorder = CudaRecorder(torch.device("cuda"))
        recorder.rehearse(lambda: entered[:] == [ours] or pytest.fail("another stream"))
        ours.wait_stream.assert_called_once_with(fakes["current_stream"].return_value)
        fakes["current_stream"].return_value.wait_stream.assert_called_once_with(ours)
        for _ in range(2):
            if fails:
                with pytest.raises(RuntimeError, match="invalidated"):
                    recorder.record(lambda: 5)
            else:
                assert recorder.record(lambda: 5) == (5, fakes["CUDAGraph"].return_value.replay)
            assert entered == []
        assert fakes["graph_pool_handle"].call_count == fakes["Stream"].call_count == 1
        shared = {"pool": recorder.pool, "stream": ours, "capture_error_mode": "thread_local"}
        assert [call.kwargs for call in graph.call_args_list] == [shared, shared]
