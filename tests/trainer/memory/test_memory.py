"""What is predicted of a rank's memory, against live strategies, real tensors and known totals."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from models.fp8_linear import FP8Linear
from models.sizes import DiTConfig
from models.weights import save_weights
from tests.trainer.memory.held import PRECISIONS, WAYS, live, make_base, overrides, recipe
from trainer.inputs import Inputs
from trainer.memory.activations import Activations, Pass, _of_depth, activations, measure
from trainer.memory.estimate import (
    GIB,
    SPEED,
    Change,
    Estimate,
    StrategyRow,
    changes,
    cheapest,
    fastest,
    gpu_memory,
    out_of_memory,
)
from trainer.memory.ledger import ON_DEVICE, Parts, Sharing, held
from trainer.memory.outline import outline
from trainer.ranks.frozen_base import convert_base
from trainer.ranks.parallel import Parallel
from trainer.ranks.strategy import PrecisionModule, blocks_of, recompute
from trainer.recipes.reading import load_recipe
from trainer.recipes.schema import Config
from trainer.stages import trained_stages
from trainer.tasks import make_task

pytestmark = pytest.mark.filterwarnings("ignore")
RANKS = (1, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory")
    make_base(folder)
    return folder


@pytest.fixture(scope="module")
def really(folder: Path) -> dict[tuple[str, int], dict[str, int]]:
    return live(folder, RANKS)


def ledger(config: Config, ranks: int, sharing: Sharing | None = None) -> Parts:
    estimate = Estimate(config, "autoencode", ranks)
    parts = held(estimate.outline, sharing or estimate.own, estimate.ranks)
    return dataclasses.replace(parts, base=parts.base - estimate.outline.beside)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("way", [way for way in WAYS if "offloaded" not in way])
def test_parts_are_those_of_a_live_strategy(really, folder, way, precision, ranks):
    parts, real = ledger(recipe(folder, *overrides(way, precision)), ranks), really[f"{way}, {precision}", ranks]
    for name in ("base", "trained", "moments", "ema"):
        assert getattr(parts, name) == real[name], name
    if way == "zero1":  # the live one was looked at when it had let go of all but its part
        assert real["gradients"] < 1.05 * parts.gradients
    elif way == "zero2":  # it holds the whole gradient of a parameter that two ranks share, of 9,216 numbers at most
        shared = 9_216 * (4 if precision == "fp32" else 2) if ranks > 1 else 0
        assert 0.98 * parts.gradients < real["gradients"] < 1.02 * parts.gradients + shared
    else:
        assert parts.gradients == pytest.approx(real["gradients"], rel=0.02)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("way", [way for way in WAYS if "offloaded" in way])
def test_offloaded_parts_are_those_of_a_live_strategy(really, folder, way, precision, ranks):
    """On a CPU both lie in the same memory; gradients in staging buffers are not looked at there."""
    parts, real = ledger(recipe(folder, *overrides(way, precision)), ranks), really[f"{way}, {precision}", ranks]
    predicted = parts.host + sum(getattr(parts, name) for name in ON_DEVICE) - parts.buffers
    assert parts.moments == parts.ema == 0
    assert 0.75 * predicted <= sum(real.values()) <= predicted


@pytest.mark.parametrize("way", WAYS)
def test_profiles_keep_one_more_average(folder, way):
    """On the device, or in host memory if it is offloaded there."""
    one, two = (
        ledger(recipe(folder, *overrides(way, "fp32"), *profiles), 2)
        for profiles in ((), ("autoencode.ema_profiles=[0.05,0.1]",))
    )
    offloaded = "offloaded" in way
    average = two.host - one.host if offloaded else one.ema
    assert average > 0
    assert dataclasses.replace(one, host=one.host + average * offloaded, ema=2 * one.ema) == two


@pytest.mark.parametrize("stage", ["pretrain", "autoencode"])
def test_the_outline_has_the_shapes_of_the_real_task(folder, stage):
    config = recipe(folder)
    found, module = outline(config, stage), make_task(config, stage).module
    named = dict(module.named_parameters())
    assert found.trained == {name: value.shape for name, value in named.items() if value.requires_grad}
    assert found.frozen == {name: value.shape for name, value in named.items() if not value.requires_grad}
    assert len(found.blocks) == len(blocks_of(module))
    assert sum(map(len, found.blocks)) == sum(len(list(block.parameters())) for block in blocks_of(module))


def real_saved(computed: PrecisionModule, shape: tuple[int, int, int]) -> int:
    """Bytes that autograd saves of a forward pass on numbers, weights aside, by its own hooks."""
    weights = {value.untyped_storage().data_ptr() for value in computed.parameters()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        terms, _ = computed(Inputs(x0=torch.randn(shape), positions=torch.arange(shape[0])))
        terms["denoising"].mean()
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in kept}
    return sum(size for place, size in storages.items() if place not in weights)


@pytest.mark.parametrize("stage", trained_stages())
def test_every_trained_stage_can_be_planned(stage):
    """Before anything is trained, at sizes that the recipe says."""
    settings = tuple(f"{name}.{key}" for name in ("quantize", "prior") for key in ("samples=8", "crop_frames=63"))
    config = load_recipe("tiny", ["quantizer.kind=qinco2", "quantizer.gain_db=6", *settings])
    estimate = Estimate(config, stage, 2)
    parts = estimate.row(estimate.own).parts
    assert parts.moments == 2 * parts.trained > 0
    assert parts.activations > 0
    assert parts.base > 0


@pytest.mark.parametrize("stage", ["pretrain", "autoencode"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_are_those_that_autograd_saves(folder, stage, precision):
    config = recipe(folder)
    how = Pass(clips=16, frames=63, precision=precision, lower_trained=False, recomputed=False, cuda=False)
    found = activations(config, stage, outline(config, stage).dit, how)
    assert sum(size for _, _, size in found.largest(10_000)) == found.saved
    computed = real_module(config, stage, precision)
    x0 = 4 * 16 * 128 * 63
    assert found.saved == pytest.approx(real_saved(computed, (16, 128, 63)) + x0, rel=0.01)


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fake_tensors_take_what_real_ones_take(folder, precision, recomputed):
    how = Pass(clips=4, frames=63, precision=precision, lower_trained=False, recomputed=recomputed, cuda=False)
    require_as_real(recipe(folder), how)


def require_as_real(config: Config, how: Pass) -> Activations:
    """Assert that a pass of `autoencode` on fake tensors takes what it takes on real ones; return the former."""
    computed = real_module(config, "autoencode", how.precision)
    convert_base(computed.module, config.parallel, torch.device("cpu"))
    for block in blocks_of(computed) if how.recomputed else ():
        recompute(block)
    fake = activations(config, "autoencode", outline(config, "autoencode").dit, how)
    real = measure(computed, (how.clips, 128, how.frames))
    for name in ("saved", "forward", "backward"):
        assert getattr(fake, name) == pytest.approx(getattr(real, name), rel=0.002), name
    return fake


def real_module(config: Config, stage: str, precision: str) -> PrecisionModule:
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    module = make_task(config, stage).module
    for value in module.parameters():
        if not value.requires_grad:
            value.data = value.data.to(dtype)
    return PrecisionModule(module, torch.device("cpu"), dtype)


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("recomputed", [False, True])
def test_a_deep_model_is_measured_at_a_few_blocks(folder, recomputed, kernels):
    config = recipe(folder)
    dit = dataclasses.replace(config.dit, depth=8, multistream_depth=4, text_width=24, text_tokens=7)
    how = Pass(2, 63, "bf16", lower_trained=False, recomputed=recomputed, cuda=True, kernels=kernels)
    assert activations(config, "autoencode", dit, how) == _of_depth(config, "autoencode", dit, how, (4, 4))


def test_kernels_are_planned_where_they_compute(folder):
    """They save less for the backward pass, in eager mode; not under ZeRO-3, which gathers weights for modules."""
    overrides = ("parallel.precision=bf16", "autoencode.global_batch=8", "parallel.device=auto")
    eager, compiled = (
        Estimate(recipe(folder, *overrides, f"parallel.compile={each}"), "autoencode", 1) for each in ("false", "null")
    )
    whole = compiled.activations(Sharing("ddp")).saved
    assert eager.activations(Sharing("ddp")).saved < 0.9 * whole
    assert eager.activations(Sharing("zero3")).saved > 0.9 * whole


def test_known_totals(folder):
    config = recipe(folder)
    trained = sum(shape.numel() for shape in outline(config, "autoencode").trained.values())
    on_one, on_two = ledger(config, 1), ledger(config, 2)
    assert on_one.trained + on_one.gradients + on_one.moments == 16 * trained
    assert on_one.ema == 4 * trained
    assert (on_one.buffers, on_two.buffers) == (0, 4 * trained)
    assert ledger(recipe(folder, "parallel.precision=bf16"), 1).base * 2 == on_one.base


FP8_BASE = ("parallel.precision=bf16", "parallel.base_precision=fp8")


def test_a_base_in_fp8_is_counted_to_the_byte(folder):
    plain, held = (Estimate(recipe(folder, *given), "autoencode", 2) for given in (FP8_BASE[:1], FP8_BASE))
    config = recipe(folder, *FP8_BASE)
    task = make_task(config, "autoencode")
    Parallel(config.parallel).prepare(task.module, config.stage("autoencode"))
    live = sum(value.nbytes for value in task.module.parameters() if not value.requires_grad)
    layers = [part for part in task.module.modules() if isinstance(part, FP8Linear)]
    in_fp8 = sum(part.weight.nbytes + part.scale.nbytes for part in layers)
    saved = sum(part.weight.numel() - part.scale.nbytes for part in layers)
    assert layers
    assert held.row(held.own).parts.base == plain.row(plain.own).parts.base - saved
    assert held.row(held.own).parts.base == live + in_fp8 + plain.outline.beside
    assert held.row(held.own).parts.trained == plain.row(plain.own).parts.trained


def test_no_row_cuts_a_base_in_fp8(folder):
    estimate = Estimate(recipe(folder, *FP8_BASE, "parallel.checkpoint_activations=true"), "autoencode", 2)
    assert {row.sharing.strategy for row in estimate.rows()} == {"ddp", "zero1", "zero2", "fsdp2"}
    assert not any(row.sharing.cuts_base for row in estimate.rows())
    assert estimate.fastest(0) is None
    offered = [setting for change in changes(estimate.config, "autoencode", 2) for setting in change.settings]
    assert not any("zero3" in setting or "shard_base" in setting for setting in offered)


def test_graphs_take_a_second_copy_of_the_gradients_and_no_other_strategy(folder):
    config = recipe(folder, "autoencode.global_batch=8")
    without = Estimate(config, "autoencode", 1)
    config.parallel.graph = True
    estimate = Estimate(config, "autoencode", 1)
    parts, plain = estimate.row(estimate.own).parts, without.row(without.own).parts
    assert dataclasses.replace(parts, buffers=0) == dataclasses.replace(plain, buffers=0)
    assert parts.buffers == max(plain.buffers, parts.gradients)
    assert [row.sharing for row in estimate.rows()] == [Sharing("ddp")]
    assert estimate.fastest(0) is None
    offered = [change.settings for change in changes(config, "autoencode", 2)]
    assert ["parallel.graph=false"] in offered
    assert not any("strategy" in str(settings) or "checkpoint_activations" in str(settings) for settings in offered)


@pytest.mark.parametrize("recomputed", [False, True])
def test_fake_products_in_fp8_take_what_real_ones_take(folder, recomputed):
    """Weights that are multiplied out, and quantized inputs, live for one product alone."""
    config = recipe(folder, *FP8_BASE)
    how = Pass(clips=4, frames=63, precision="bf16", lower_trained=False, recomputed=recomputed, cuda=False)
    fake = require_as_real(config, how)
    plain = activations(recipe(folder, *FP8_BASE[:1]), "autoencode", outline(config, "autoencode").dit, how)
    assert fake.saved <= plain.saved


def test_more_clips_and_frames_take_more(folder):
    def total(*given: str) -> int:
        estimate = Estimate(recipe(folder, "autoencode.global_batch=64", *given), "autoencode", 2)
        return estimate.row(estimate.own).parts.total

    micro = "parallel.micro_batch=4"
    assert total("parallel.micro_batch=8") > total(micro) > total(micro, "parallel.checkpoint_activations=true")
    assert total(micro) > total(micro, "autoencode.crop_frames=27")


def test_more_ranks_hold_less_each(folder):
    def rows(ranks: int, *given: str) -> dict[str, int]:
        estimate = Estimate(recipe(folder, *given), "autoencode", ranks)
        parts = {way.short: held(estimate.outline, way, estimate.ranks) for way in SPEED}
        return {way: part.total + part.host for way, part in parts.items()}

    few, many, grouped = rows(2), rows(8), rows(8, "parallel.strategy=fsdp2", "parallel.replicas=4")
    assert many.pop("ddp") == few["ddp"]
    assert all(total < few[way] for way, total in many.items())
    assert {way for way, total in grouped.items() if total > rows(8)[way]} == {"fsdp2", "fsdp2 base cut"}


def test_the_fastest_that_fits():
    def row(sharing: Sharing, gib: float) -> StrategyRow:
        return StrategyRow(sharing, Parts(base=int(gib * GIB)))

    needed = {"ddp": 90, "zero1": 80, "zero2": 70, "fsdp2": 40, "zero3": 30}
    rows = [row(sharing, needed[sharing.strategy] / (2 if sharing.checkpoint_activations else 1)) for sharing in SPEED]
    chosen = {total: fastest(rows, total * GIB) for total in (100, 80, 50, 20, 10)}
    labels = {total: row and row.sharing.settings for total, row in chosen.items()}
    assert labels == {
        100: ["parallel.strategy=ddp"],
        80: ["parallel.strategy=zero2"],
        50: ["parallel.strategy=fsdp2"],
        20: ["parallel.strategy=zero3", "parallel.checkpoint_activations=true"],
        10: None,
    }


def test_every_way_can_be_set():
    for sharing in SPEED:
        config = load_recipe("demo", [*sharing.settings, "parallel.processes=4"])
        assert Sharing.of(config.parallel) == sharing


def test_cheapest_changes_are_of_different_kinds():
    def change(gib: float, cost: str) -> Change:
        return Change([f"{cost}={gib}"], cost, StrategyRow(Sharing(), Parts(base=int(gib * GIB))))

    now = change(50, "now").row
    candidates = [change(40, "a"), change(20, "a"), change(10, "a"), change(60, "b"), change(30, "c"), change(5, "d")]
    assert [found.settings for found in cheapest(candidates, now, 35 * GIB)] == [["a=20"], ["c=30"], ["d=5"]]
    assert [found.settings for found in cheapest(candidates, now, 3 * GIB)] == [["d=5"], ["a=10"], ["c=30"]]


def test_out_of_memory_tells_what_to_set(folder):
    config = recipe(folder, "autoencode.global_batch=64")
    estimate = Estimate(config, "autoencode", 2)
    now = estimate.row(estimate.own).parts.total
    told = out_of_memory(config, "autoencode", 2, 1.2 * now, 1.25 * now + GIB / 0.95 + now)
    assert re.search(r"base +trained +gradients +moments +ema +activations +buffers +predicted +measured", told)
    assert "parallel.micro_batch=16" in told
    changes = re.findall(r"^  (\S+)=\S+.*: [\d.]+ [KM]iB; ", told, re.MULTILINE)
    assert len(changes) == 3
    assert "no single change is enough" in out_of_memory(config, "autoencode", 2, now, GIB)


def test_a_missing_folder_is_told(tmp_path):
    config = load_recipe("demo", [f"pretrained.folder={tmp_path / 'none'}"], released=False)
    assert "pretrained.folder" not in config.stages
    with pytest.raises((ValueError, OSError), match="none"):
        outline(config, "autoencode")
    assert "Lower parallel.micro_batch" in out_of_memory(config, "autoencode", 1, GIB, GIB)


def test_sizes_come_from_the_header_of_an_export(tmp_path):
    sizes = DiTConfig(channels=128, width=24, depth=1, heads=2, hidden_width=48, text_width=None)
    save_weights(tmp_path / "dit.safetensors", {}, dataclasses.asdict(sizes) | {"diffusion": {"name": "edm"}})
    config = load_recipe("demo", [f"pretrained.folder={tmp_path}"])
    assert outline(config, "autoencode").dit == sizes


def test_memory_of_a_gpu():
    assert gpu_memory(load_recipe("demo", ["parallel.gpu_gib=24", "parallel.device=cpu"]).parallel) == 24 * GIB
    with pytest.raises(ValueError, match=r"parallel\.gpu_gib"):
        load_recipe("demo", ["parallel.gpu_gib=0"])
