"""The variants of LoRA under every strategy: the same curve, and any checkpoint resumes under any strategy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from models import lora
from tests.trainer import rank_processes
from tests.trainer.ranks.strategies import STRATEGIES, Trained, _spoil, _write, group, recipe

VARIANTS = ("rslora", "dora", "pissa")
pytestmark = pytest.mark.filterwarnings("ignore")


def train_and_resume(rank: int, world_size: int, folder: str, saved: dict[str, str]) -> None:
    """Train each variant under each strategy and save half-way; then resume from `saved` under each."""
    results: dict[str, Any] = {}
    with group():
        for variant in VARIANTS:
            for strategy in STRATEGIES if world_size > 1 else ("ddp",):
                overrides = (f"lora.variant={variant}", f"parallel.strategy={strategy}")
                trained = Trained.begin(recipe(Path(folder), *overrides))
                curve = trained.steps()
                path = trained.save(Path(folder) / f"{variant} {strategy} on {world_size}")
                curve += trained.steps()
                found = {"curve": curve, "path": str(path), "names": sorted(trained.whole())}
                if variant in saved:
                    _spoil(trained.state.held())
                    trained.load(Path(saved[variant]))
                    found["resumed"] = trained.steps()
                if world_size > 1:
                    lower = Trained.begin(recipe(Path(folder), *overrides, "parallel.precision=bf16"))
                    found["bf16"] = lower.steps()
                    factors = lora.start_factors(lower.state.task.module.dit)
                    found["types"] = [str(value.dtype) for value in factors.values()]
                results[f"{variant} {strategy}"] = found
    _write(folder, f"lora_{world_size}", rank, results)


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[int, dict[str, Any]]:
    """World size → variant and strategy → what came of it; both resume from what ZeRO-3 or DDP saved on the other."""
    found: dict[int, dict[str, Any]] = {}
    saved: dict[str, str] = {}
    for world_size, saves in ((1, "ddp"), (2, "zero3"), (1, "ddp")):
        arguments = (world_size, str(folder), saved)
        assert rank_processes.run(train_and_resume, world_size, *arguments, seconds=500) == [0] * world_size
        found[world_size] = json.loads((folder / f"lora_{world_size}.json").read_text())
        saved = {variant: found[world_size][f"{variant} {saves}"]["path"] for variant in VARIANTS}
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_reference_learns_as_no_other_variant(results, variant):
    curve = results[1][f"{variant} ddp"]["curve"]
    assert curve[-1] < curve[0]
    assert all(results[1][f"{other} ddp"]["curve"] != curve for other in VARIANTS if other != variant)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_strategy_gives_the_same_curve_and_resumes(results, variant, strategy):
    reference = results[1][f"{variant} ddp"]["curve"]
    found = results[2][f"{variant} {strategy}"]
    assert found["curve"] == pytest.approx(reference, rel=1e-5)
    assert found["resumed"] == pytest.approx(reference[len(reference) // 2 :], rel=1e-5)
    assert found["bf16"] == pytest.approx(reference[: len(found["bf16"])], rel=2e-2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_rank_resumes_what_zero_3_saved_on_two(results, variant):
    found = results[1][f"{variant} ddp"]
    assert found["resumed"] == pytest.approx(found["curve"][len(found["curve"]) // 2 :], rel=1e-5)


def test_a_checkpoint_holds_the_fixed_factors_of_pissa_and_never_the_base(results):
    for variant in VARIANTS:
        names = results[2][f"{variant} zero3"]["names"]
        assert not any("base_layer" in name for name in names)
        assert any("pissa_start" in name for name in names) == (variant == "pissa")
        assert any("lora_magnitude_vector" in name for name in names) == (variant == "dora")
    types = {kind for strategy in STRATEGIES for kind in results[2][f"pissa {strategy}"]["types"]}
    assert types == {str(torch.float32)}
