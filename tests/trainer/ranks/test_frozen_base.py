"""A frozen base in FP8 under every strategy that takes one, and checkpoints that go between base precisions."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from models.fp8_linear import FP8, FP8Linear, quantized
from tests.trainer import rank_processes
from tests.trainer.ranks.strategies import STEPS, Trained, _spoil, _write, group, recipe
from trainer.memory.outline import OutlinedModels
from trainer.ranks.frozen_base import convert_base, require_device
from trainer.tasks import make_task

STRATEGIES = ("ddp", "zero1", "zero2", "fsdp2")
BF16 = "parallel.precision=bf16"
FP8_BASE = "parallel.base_precision=fp8"
pytestmark = pytest.mark.filterwarnings("ignore")


def train_and_resume(rank: int, world_size: int, folder: str) -> None:
    """Train under each strategy on either base, save half-way, go on; resume both checkpoints on either base."""
    results: dict[str, Any] = {}
    with group():
        for strategy in STRATEGIES:
            for base in ("same", "fp8"):
                overrides = (BF16, f"parallel.strategy={strategy}", f"parallel.base_precision={base}")
                trained = Trained.begin(recipe(Path(folder), *overrides))
                curve = trained.steps()
                path = trained.save(Path(folder) / f"{strategy} {base} on {world_size}")
                curve += trained.steps()
                layers = [part for part in trained.state.task.module.modules() if isinstance(part, FP8Linear)]
                found = {"curve": curve, "path": str(path), "names": sorted(trained.whole()), "layers": len(layers)}
                found["types"] = sorted({str(part.dtype) for layer in layers for part in layer.state_dict().values()})
                for saved in ("same", "fp8"):
                    if f"{strategy} {saved}" in results or saved == base:
                        of_saved = results.get(f"{strategy} {saved}", found)
                        _spoil(trained.state.held())
                        trained.load(Path(of_saved["path"]))
                        found[f"from {saved}"] = trained.steps()
                results[f"{strategy} {base}"] = found
    _write(folder, f"base_{world_size}", rank, results)


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[int, dict[str, Any]]:
    found = {}
    for world_size in (1, 2):
        assert rank_processes.run(train_and_resume, world_size, world_size, str(folder)) == [0] * world_size
        found[world_size] = json.loads((folder / f"base_{world_size}.json").read_text())
    return found


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_curve_stays_near_that_of_bf16_under_every_strategy(results, strategy, world_size):
    found, plain = (results[world_size][f"{strategy} {base}"] for base in ("fp8", "same"))
    assert found["curve"] != plain["curve"]
    assert found["curve"] == pytest.approx(plain["curve"], rel=1e-2)
    assert found["curve"] == pytest.approx(results[1]["ddp fp8"]["curve"], rel=5e-3)
    assert (found["layers"] > 0, plain["layers"]) == (True, 0)
    assert found["types"] == ["torch.bfloat16", "torch.float32", str(FP8)]  # biases, scales, weights


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(results, strategy):
    found = results[1][f"{strategy} fp8"]
    assert found["from fp8"] == found["curve"][STEPS:]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_checkpoint_of_either_base_resumes_on_fp8(results, strategy, world_size):
    """It holds what was trained alone, under the same names."""
    found, plain = (results[world_size][f"{strategy} {base}"] for base in ("fp8", "same"))
    assert found["from same"] == pytest.approx(plain["curve"][STEPS:], rel=1e-2)
    assert found["names"] == plain["names"]
    assert not any("base_layer" in name for name in found["names"])


def test_a_run_goes_on_without_fp8(results, folder):
    trained = Trained.begin(recipe(folder, BF16))
    trained.load(Path(results[1]["ddp fp8"]["path"]))
    assert trained.steps() == pytest.approx(results[1]["ddp fp8"]["curve"][STEPS:], rel=1e-2)


def test_the_hash_and_the_count_are_those_of_the_base_itself(folder):
    plain, held = (Trained.begin(recipe(folder, BF16, *given)).state for given in ((), (FP8_BASE,)))
    assert held.task.base_hash == plain.task.base_hash
    assert held.strategy.numel == plain.strategy.numel
    assert held.strategy.numel_learned == plain.strategy.numel_learned


def test_the_weights_are_those_of_the_file_quantized_before_any_rounding_to_bf16(folder):
    config = recipe(folder, BF16, FP8_BASE)
    held = Trained.begin(config).state.task.module.dit.blocks[0].out.base_layer
    original = make_task(config, "autoencode").module.dit.blocks[0].out.base_layer.weight
    assert torch.equal(held.weight.view(torch.uint8), quantized(original)[0].view(torch.uint8))


@pytest.mark.parametrize(("width", "told"), [(96, "in FP8"), (100, "stay in bf16, because a width is no multiple")])
def test_the_log_says_what_is_in_fp8(folder, caplog, width, told):
    config = recipe(folder, BF16, FP8_BASE, f"dit.hidden_width={width}", "pretrained.folder=null")
    task = make_task(config, "autoencode", models=OutlinedModels(config, config.dit))
    with caplog.at_level(logging.INFO):
        convert_base(task.module, config.parallel, torch.device("cpu"))
    (line,) = caplog.messages
    assert told in line
    assert line.startswith(f"{sum(isinstance(part, FP8Linear) for part in task.module.modules())} linear layers")


def test_a_stage_without_a_frozen_base_is_as_without_the_key(folder, caplog):
    config = recipe(folder, BF16, FP8_BASE)
    task = make_task(config, "pretrain")
    before = {name: id(value) for name, value in task.module.named_parameters()}
    convert_base(task.module, config.parallel, torch.device("cpu"))
    assert {name: id(value) for name, value in task.module.named_parameters()} == before
    assert not caplog.messages


def test_a_gpu_that_cannot_is_refused(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    gpu = torch.device("cuda")
    require_device(recipe(folder, BF16).parallel, gpu)
    with pytest.raises(ValueError, match=r"8\.9 or newer .* NVIDIA A100 is not: remove parallel\.base_precision"):
        require_device(recipe(folder, BF16, FP8_BASE).parallel, gpu)
