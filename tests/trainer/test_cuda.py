"""What a CPU can't show: the strategies on a GPU, and checkpoints that go from one to the other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from models.fp8_linear import FP8Linear, dequantized, multiplies_fp8, quantized
from models.fused import heads, norm, use
from tests.trainer import rank_processes
from tests.trainer.ranks.strategies import STEPS, STRATEGIES, Trained, group, make_base, recipe
from trainer.inputs import Inputs
from trainer.loop import train_step
from trainer.objectives import Denoiser
from trainer.ranks.graphed import Graphed
from trainer.stop import Stop
from trainer.training import set_up

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
PRECISIONS = ("fp32", "bf16", "fp16")
FP8_STRATEGIES = ("ddp", "zero1", "zero2", "fsdp2")
needs_fp8 = pytest.mark.skipif(
    torch.cuda.is_available() and not multiplies_fp8(torch.device("cuda")), reason="this GPU has no products in FP8"
)


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


def fp8_curves(rank: int, folder: str, device: str) -> None:
    """The curve on a base in FP8 of every strategy that takes one."""
    curves = {}
    with group():
        for strategy in FP8_STRATEGIES:
            overrides = (f"parallel.device={device}", f"parallel.strategy={strategy}", "parallel.precision=bf16")
            curves[strategy] = Trained.begin(recipe(Path(folder), *overrides, "parallel.base_precision=fp8")).steps()
    (Path(folder) / f"fp8_{device}.json").write_text(json.dumps(curves))


@pytest.mark.parametrize("part", [norm, heads])
def test_kernels_give_the_plain_forms_numbers_on_this_gpu(part):
    assert use._works(part._trial, torch.device("cuda"))


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


@pytest.mark.parametrize("chosen", ["strategy=ddp", "strategy=fsdp2", "graph=true"])
def test_the_host_waits_for_no_step_but_the_one_before(chosen, tiny):
    config = tiny(
        *("pretrain.samples=64", "log.every=1000", "log.samples_every=0", "checkpoint.every=1000"),
        *(f"parallel.{chosen}", "parallel.micro_batch=4", "parallel.device=cuda"),
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
        if isinstance(training.strategy, Graphed):
            assert len(training.strategy.graphs.recorded) == 1
            assert all(training.strategy.graphs.recorded.values())


GRAPHS = ("pretrain.samples=64", "parallel.compile=false", "parallel.graph=true", "parallel.device=cuda")


def test_a_graph_gives_what_the_pass_gives(tiny, tmp_path):
    """Each is computed by the same kernels; sums by atomic additions may differ in their order."""
    gradients = []
    for graph in ("false", "true"):
        config = tiny(*GRAPHS, f"parallel.graph={graph}", run_dir=tmp_path / graph)
        with set_up(config, "pretrain", Stop(), lambda: None) as training:
            for _ in range(2):  # the second one is a replay of what the first one recorded
                batch = training.feed.next()
                inputs = batch.to(training.parallel.device, training.task.module.draws(batch.positions))
                training.strategy.backward(training.strategy.forward(inputs).total({}).mean(), last=True)
            gradients.append({name: value.grad.clone() for name, value in training.strategy.learned.items()})
    plain, graphed = gradients
    for name, value in plain.items():
        assert (graphed[name] - value).norm() <= 1e-5 * value.norm(), name


def test_what_a_graph_cannot_hold_is_told_with_the_mend(tiny, monkeypatch):
    plain = Denoiser.terms

    def reading(module: Denoiser, inputs: Inputs, prediction: Any) -> dict[str, torch.Tensor]:
        terms = plain(module, inputs, prediction)
        float(terms["denoising"][0])
        return terms

    monkeypatch.setattr(Denoiser, "terms", reading)
    with (
        set_up(tiny(*GRAPHS), "pretrain", Stop(), lambda: None) as training,
        pytest.raises(ValueError, match=r"cannot be recorded as a CUDA graph.*set parallel\.graph=false"),
    ):
        train_step(training)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()


@needs_fp8
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(4576, 1024, 3072), (77, 4096, 1024), (1, 16, 48)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_gpus_product_in_fp8_is_that_of_the_dequantized_numbers(rows, inputs, outputs, bias):
    """The numbers are quantized as on a CPU, to the bit; sums in FP8 are rounded more coarsely than in float32."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)
    x = torch.randn(rows, inputs, dtype=torch.bfloat16)
    held = FP8Linear(layer, torch.device("cuda"))
    weight, scale = quantized(layer.weight)
    assert torch.equal(held.weight.cpu().view(torch.uint8), weight.view(torch.uint8))
    assert torch.equal(held.scale.cpu(), scale)
    expected = dequantized(*quantized(x), torch.float32) @ dequantized(weight, scale, torch.float32).T
    if bias:
        expected += layer.bias
        held.bias = torch.nn.Parameter(layer.bias.cuda(), requires_grad=False)
    found = held(x.cuda()).float().cpu()
    assert (found - expected).norm() < 1e-2 * expected.norm()


@needs_fp8
def test_a_gpus_curve_on_a_base_in_fp8_is_the_cpus(tmp_path):
    make_base(tmp_path)
    for device in ("cpu", "cuda"):
        assert rank_processes.run(fp8_curves, 1, str(tmp_path), device) == [0]
    ours, theirs = (json.loads((tmp_path / f"fp8_{device}.json").read_text()) for device in ("cuda", "cpu"))
    for strategy in FP8_STRATEGIES:
        assert ours[strategy] == pytest.approx(theirs["ddp"], rel=2e-2), strategy
