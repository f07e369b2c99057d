"""Runs and ranks with micro batches as CUDA graphs: the same as with DDP. A stand-in repeats what is recorded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer import rank_processes
from tests.trainer.ranks.recorders import graphs_on_cpu, with_graphs
from tests.trainer.ranks.strategies import Trained, group, recipe
from tests.trainer.test_host_waits import Waits
from tests.trainer.test_loop import losses, stop_after, tensors
from trainer.loop import train, train_step
from trainer.ranks.graph import require_cuda
from trainer.recipes.parallel import ParallelConfig
from trainer.recipes.schema import Config
from trainer.stop import Stop
from trainer.training import set_up

RUN = ("pretrain.samples=48", "autoencode.samples=48", "log.every=8", "log.samples_every=0", "checkpoint.every=16")
LAST = "checkpoints/step_000000000048"
VARIANTS: dict[str, tuple[str, ...]] = {
    "fp32": (),
    "bf16": ("parallel.precision=bf16",),
    "accumulated": ("parallel.micro_batch=1",),
    "gradients in bf16": ("parallel.gradient_precision=bf16",),
}


@pytest.fixture
def on_cpu():
    with graphs_on_cpu() as recorders:
        yield recorders


def both(tiny: Any, tmp_path: Path, *overrides: str) -> tuple[Config, Config]:
    plain = tiny(*RUN, *overrides, run_dir=tmp_path / "plain")
    return plain, with_graphs(tiny(*RUN, *overrides, run_dir=tmp_path / "graphed"))


def require_equal_runs(tmp_path: Path, stage: str) -> None:
    assert len(losses(tmp_path / "plain", stage)) == 6
    assert losses(tmp_path / "graphed", stage) == losses(tmp_path / "plain", stage)
    ours, theirs = (tensors(tmp_path / run / stage / LAST) for run in ("graphed", "plain"))
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("stage", ["pretrain", "autoencode"])
def test_a_whole_run_is_the_same_to_the_bit(stage, tiny, tmp_path, on_cpu):
    """With held-out losses and checkpoints between, and two micro batches to a step."""
    for config in both(tiny, tmp_path, "parallel.micro_batch=4"):
        if stage == "autoencode":
            assert train(config, "pretrain") == "done"
        assert train(config, stage) == "done"
    require_equal_runs(tmp_path, stage)
    assert on_cpu[-1].repetitions == 2 * 2 * 6


def test_a_run_that_is_stopped_and_resumed_is_the_same_to_the_bit(tiny, tmp_path, on_cpu):
    plain, graphed = both(tiny, tmp_path)
    assert train(plain, "pretrain") == "done"
    assert train(graphed, "pretrain", stop=stop_after(3)) == "stopped"
    assert train(graphed, "pretrain") == "done"
    require_equal_runs(tmp_path, "pretrain")
    assert len(on_cpu) == 2


def test_a_run_may_change_between_graphs_and_none(tiny, tmp_path, on_cpu):
    plain, graphed = both(tiny, tmp_path)
    assert train(plain, "pretrain") == "done"
    shutil.copytree(tmp_path / "plain", tmp_path / "graphed")
    stage = tmp_path / "graphed" / "pretrain"
    shutil.rmtree(stage / LAST)
    (stage / "status.json").unlink()
    assert train(graphed, "pretrain") == "done"
    require_equal_runs(tmp_path, "pretrain")


@pytest.mark.parametrize("poisoned", [(3,), (3, 4, 5)])
def test_skipped_steps_and_rewinds_are_the_same(poisoned, tiny, tmp_path, on_cpu, monkeypatch):
    """The weights are loaded in place, and the graphs stay."""
    from trainer import training as module

    overrides = ("health.rewind_after=3", "health.max_rewinds=1", "checkpoint.every=8")
    plain_feed = module.Feed.next
    for config in both(tiny, tmp_path, *overrides):
        calls = []

        def spoiled(feed: Any, calls: list[int] = calls) -> Any:
            batch = plain_feed(feed)
            calls.append(1)
            if len(calls) in poisoned:
                batch.x0.fill_(float("nan"))
            return batch

        monkeypatch.setattr(module.Feed, "next", spoiled)
        assert train(config, "pretrain") == "done"
    require_equal_runs(tmp_path, "pretrain")
    assert len(on_cpu[-1].results) == 2
    incidents = [json.loads((tmp_path / run / "pretrain/incident.json").read_text()) for run in ("plain", "graphed")]
    assert [incident["what"] for incident in incidents[1]] == [incident["what"] for incident in incidents[0]]
    assert ("went back" in str(incidents[1])) == (len(poisoned) == 3)


def test_a_whole_step_reads_back_the_step_before_alone(tiny, on_cpu):
    config = with_graphs(tiny(*RUN, "log.every=1000", "checkpoint.every=1000", "parallel.micro_batch=4"))
    with set_up(config, "pretrain", Stop(), lambda: None) as training:
        train_step(training)
        feed = [training.feed.next() for _ in range(2)]
        training.feed.next = lambda: feed.pop()  # type: ignore[method-assign]
        drawn = [training.task.module.draws(batch.positions) for batch in feed]
        training.task.module.draws = lambda positions: drawn.pop()  # type: ignore[method-assign]
        training.settle()
        with Waits() as waits:
            assert train_step(training) is not None
        assert waits.found == []


def curves(rank: int, folder: str) -> None:
    """Train each variant with DDP and with graphs, with a refused and a poisoned step; write curves and weights."""
    results: dict[str, Any] = {}
    with group(), graphs_on_cpu():
        for name, overrides in VARIANTS.items():
            for kind in ("ddp", "graphs"):
                config = recipe(Path(folder), *overrides)
                trained = Trained.begin(with_graphs(config) if kind == "graphs" else config)
                curve = trained.steps()
                trained.step(accepted=False)
                trained.step(poisoned=True)
                weights = {key: value.double().sum().item() for key, value in trained.copy().items()}
                results.setdefault(name, {})[kind] = {"curve": curve + trained.steps(), "weights": weights}
                assert type(trained.state.strategy).__name__ == {"ddp": "Replicated", "graphs": "Graphed"}[kind]
    (Path(folder) / f"graphs_{rank}.json").write_text(json.dumps(results))


@pytest.mark.parametrize("world_size", [1, 2])
def test_ranks_with_graphs_learn_what_ranks_with_ddp_learn(world_size, folder):
    """To the bit in float32: each gradient is divided by the number of ranks, then summed. bf16 rounds sums alike."""
    assert rank_processes.run(curves, world_size, str(folder)) == [0] * world_size
    for rank in range(world_size):
        found = json.loads((folder / f"graphs_{rank}.json").read_text())
        assert found.keys() == VARIANTS.keys()
        for name, kinds in found.items():
            assert kinds["graphs"] == kinds["ddp"], name


def test_fp16_and_its_loss_scale(folder):
    assert rank_processes.run(scaled_curves, 1, str(folder)) == [0]
    found = json.loads((folder / "scaled.json").read_text())
    assert found["graphs"] == found["ddp"]


def scaled_curves(rank: int, folder: str) -> None:
    found = {}
    with group(), graphs_on_cpu():
        for kind in ("ddp", "graphs"):
            config = recipe(Path(folder), "parallel.precision=fp16")
            trained = Trained.begin(with_graphs(config) if kind == "graphs" else config)
            found[kind] = trained.steps(2)
            trained.state.strategy.scale = 128.0
            found[kind] += trained.steps(2)
    (Path(folder) / "scaled.json").write_text(json.dumps(found))


def test_without_a_gpu_the_recipe_is_refused():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    with pytest.raises(ValueError, match=r"parallel\.graph=true.*remove parallel\.graph"):
        require_cuda(ParallelConfig(graph=True), cpu)
    require_cuda(ParallelConfig(graph=True), cuda)
    require_cuda(ParallelConfig(), cpu)
