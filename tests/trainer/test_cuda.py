"""What a CPU can't show: the strategies on a GPU, and checkpoints that go from one to the other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer import rank_processes
from tests.trainer.ranks.strategies import STEPS, STRATEGIES, Trained, group, make_base, recipe
from trainer.loop import train_step
from trainer.stop import Stop
from trainer.training import set_up

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
PRECISIONS = ("fp32", "bf16", "fp16")


def curves(rank: int, folder: str, device: str) -> None:
    """Every strategy's curve, a checkpoint of each, and the curve after loading the other device's, if it is there."""
    results: dict[str, Any] = {}
    with group():
        for strategy in STRATEGIES:
            for precision in PRECISIONS if device == "cuda" else ("fp32",):
                overrides = (f"parallel.strategy={strategy}", f"parallel.precision={precision}")
                trained = Trained.begin(recipe(Path(folder), f"parallel.device={device}", *overrides))
                curve = trained.steps()
                path = trained.save(Path(folder) / f"{device} {strategy} {precision}")
                results[f"{strategy} {precision}"] = {"curve": curve + trained.steps(), "path": str(path)}
        others = Path(folder) / "cpu.json"
        for strategy in STRATEGIES if others.exists() else ():
            trained = Trained.begin(recipe(Path(folder), f"parallel.device={device}", f"parallel.strategy={strategy}"))
            trained.load(Path(json.loads(others.read_text())["ddp fp32"]["path"]))
            results[f"{strategy} from the CPU"] = {"curve": trained.steps()}
    (Path(folder) / f"{device}.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("cuda")
    make_base(folder)
    for device in ("cpu", "cuda"):
        assert rank_processes.run(curves, 1, str(folder), device) == [0]
    return {device: json.loads((folder / f"{device}.json").read_text()) for device in ("cpu", "cuda")}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 2e-2), ("fp16", 1e-2)])
def test_a_gpu_gives_the_cpus_curve(results, strategy, precision, tolerance):
    ours, theirs = results["cuda"][f"{strategy} {precision}"]["curve"], results["cpu"]["ddp fp32"]["curve"]
    assert ours == pytest.approx(theirs, rel=tolerance)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_gpu_goes_on_from_the_cpus_checkpoint(results, strategy):
    ours = results["cuda"][f"{strategy} from the CPU"]["curve"]
    assert ours == pytest.approx(results["cpu"]["ddp fp32"]["curve"][STEPS:], rel=1e-3)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_the_host_waits_for_no_step_but_the_one_before(strategy, tiny):
    config = tiny(
        *("pretrain.samples=64", "log.every=1000", "log.samples_every=0", "checkpoint.every=1000"),
        *(f"parallel.strategy={strategy}", "parallel.micro_batch=4", "parallel.device=cuda"),
    )
    with set_up(config, "pretrain", Stop(), lambda: None) as training:
        for _ in range(3):  # the first step allocates
            train_step(training)
        torch.cuda.set_sync_debug_mode("error")  # an event that is waited for is no error
        try:
            for _ in range(3):
                train_step(training)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        training.settle()
        assert training.state.steps == 6
