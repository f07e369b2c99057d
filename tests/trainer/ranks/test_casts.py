"""Weights that are cast together: the same numbers as autocast's own casts, in a few kernels."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.trainer import rank_processes
from tests.trainer.ranks.recorders import RerunningRecorder
from trainer.inputs import Inputs
from trainer.memory.outline import OutlinedModels
from trainer.ranks.casts import groups_of
from trainer.ranks.graphed import Graphed
from trainer.ranks.strategy import PrecisionModule, Replicated, blocks_of, recompute
from trainer.recipes.reading import load_recipe
from trainer.recipes.schema import Config
from trainer.tasks import make_task

CPU = torch.device("cpu")


class Kernels(TorchDispatchMode):
    """Counts operations by name inside a `with`."""

    def __init__(self):
        super().__init__()
        self.names = Counter()
        self.cast = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function._overloadpacket.__name__
        self.names[name] += 1
        if name == "_to_copy" and arguments[0].ndim == 2:
            self.cast.append(tuple(arguments[0].shape))
        return function(*arguments, **(options or {}))


def recipe(*overrides: str) -> Config:
    return load_recipe("tiny", ["parallel.device=cpu", "parallel.precision=bf16", *overrides])


def computed(config: Config, *, together: bool, recomputed: bool = False, stage: str = "autoencode") -> PrecisionModule:
    """A stage's module with noise in all its weights, its frozen ones in bf16 as in training."""
    torch.manual_seed(0)
    module = make_task(config, stage, models=OutlinedModels(config, config.dit)).module
    with torch.no_grad():
        for value in module.parameters():
            value.add_(torch.randn_like(value) * 0.05)
            value.data = value.data if value.requires_grad else value.data.bfloat16()
    for block in blocks_of(module) if recomputed else ():
        recompute(block)
    made = PrecisionModule(module, CPU, torch.bfloat16)
    if together:
        made.cast_together()
    return made


def loss_of(module: PrecisionModule) -> Tensor:
    x0 = torch.randn(2, 128, 63, generator=torch.Generator().manual_seed(1))
    terms, _ = module(Inputs(x0=x0, positions=torch.arange(2)))
    return sum(value.mean() for value in terms.values())


def passed(module: PrecisionModule) -> list[Tensor | None]:
    """The loss and the gradients of two micro batches."""
    losses = [loss_of(module) for _ in range(2)]
    for loss in losses:
        loss.backward()
    return [*(loss.detach() for loss in losses), *(value.grad for value in module.parameters())]


def same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other is None or (one is not None and other is not None and torch.equal(one, other))


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("variant", ["plain", "rslora", "pissa", "dora"])
def test_losses_and_gradients_are_those_of_autocast_to_the_bit(variant, recomputed):
    config = recipe(f"lora.variant={variant}")
    together, alone = (passed(computed(config, together=each, recomputed=recomputed)) for each in (True, False))
    assert sum(value is not None for value in together) > 20
    assert all(map(same, together, alone))


@pytest.mark.parametrize("stage", ["pretrain", "autoencode"])
def test_every_stage_with_a_d_computes_the_same(stage):
    config = recipe("dit.gated_skip=true")
    together, alone = (passed(computed(config, together=each, stage=stage)) for each in (True, False))
    assert all(map(same, together, alone))


def test_few_kernels_cast_all_weights_of_products():
    module = computed(recipe(), together=True)
    groups = groups_of(module.module, blocks_of(module))
    with Kernels() as forward:
        loss = loss_of(module)
    with Kernels() as backward:
        loss.backward()
    assert forward.names["_foreach_copy_"] == 1
    assert backward.names["_foreach_copy_"] == len(groups) == len(blocks_of(module)) + 1
    shapes = {tuple(getattr(owner, name).shape) for group in groups for owner, name in group}
    assert not shapes & {*forward.cast, *backward.cast}


def test_the_weights_are_back_after_a_pass_and_after_an_error():
    module = computed(recipe(), together=True)
    before = dict(module.named_parameters())
    loss_of(module)
    assert all(value is before[name] for name, value in module.named_parameters())
    with pytest.raises(RuntimeError):
        module(Inputs(x0=torch.randn(2, 5, 63), positions=torch.arange(2)))
    assert all(value is before[name] for name, value in module.named_parameters())


def test_a_pass_takes_the_weights_of_its_time():
    """No copy outlives its pass: an optimizer's step, and a checkpoint that is loaded, are seen by the next one."""
    module = computed(recipe(), together=True)
    first = loss_of(module)
    with torch.no_grad():
        for value in module.parameters():
            value.mul_(0.5)
    second = loss_of(module)
    other = computed(recipe(), together=False)
    with torch.no_grad():
        for value in other.parameters():
            value.mul_(0.5)
    assert torch.equal(second, loss_of(other))
    assert not torch.equal(first, second)


def test_a_weight_without_a_gradient_has_none():
    """The optimizer leaves such a weight out, where a gradient of zero would decay it."""
    module = computed(recipe(), together=True)
    layer = module.module.g.blocks[0].feed_forward[0]
    layer.forward = lambda x: x.new_zeros(*x.shape[:-1], layer.out_features)  # its weight and bias go unused
    loss_of(module).backward()
    assert layer.weight.grad is None
    assert sum(value.grad is not None for value in module.parameters()) > 20


def test_float32_and_stages_without_a_d_cast_nothing():
    config = recipe("quantizer.kind=qinco2")
    assert groups_of(make_task(config, "quantize", models=OutlinedModels(config, config.dit)).module, []) == []
    whole = PrecisionModule(computed(recipe(), together=False).module, CPU, torch.float32)
    whole.cast_together()
    with Kernels() as kernels:
        loss_of(whole)
    assert kernels.names["_foreach_copy_"] == 0


@pytest.mark.parametrize(("device", "kernels"), [("cpu", 0), ("cuda", 1)])
def test_ddp_on_a_gpu_casts_together_and_steps_the_weights_themselves(device, kernels):
    config = recipe()
    module = computed(config, together=False)
    module.device_type = device
    strategy = Replicated(module, config.stage("autoencode"), rank=0, world_size=1)
    module.device_type = "cpu"
    with Kernels() as forward:
        loss_of(module)
    assert forward.names["_foreach_copy_"] == kernels
    assert all(value.dtype == torch.float32 and value.is_leaf for value in strategy.learned.values())


def test_a_recording_takes_the_weights_of_each_replay():
    """CUDA graphs repeat the casts with the rest of the pass: a step between two replays is seen."""
    config = recipe()
    module = computed(config, together=True)
    strategy = Graphed(module, config.stage("autoencode"), RerunningRecorder(), rank=0, world_size=1)
    inputs = Inputs(x0=torch.randn(2, 128, 63), positions=torch.arange(2))
    for _ in range(3):
        with torch.no_grad():
            for value in strategy.learned.values():
                value.mul_(0.9)
        losses = strategy.forward(inputs)
        strategy.backward(losses.total({}).mean(), last=True)
        expected, _ = module(inputs)
        assert torch.equal(losses.terms["denoising"], expected["denoising"])


def compared(rank: int) -> None:
    """Two accumulated micro batches of two ranks, with and without casts together."""
    torch.distributed.init_process_group("gloo")
    inputs = Inputs(x0=torch.randn(2, 128, 63), positions=torch.arange(2) + 2 * rank)
    found = []
    for together in (True, False):
        module = computed(recipe(), together=together)
        strategy = Replicated(module, recipe().stage("autoencode"), rank=rank, world_size=2)
        for last in (False, True):
            with strategy.reducing(last=last):
                strategy.backward(strategy.forward(inputs).total({}).mean(), last=last)
        found.append([value.grad for value in module.parameters()])
    assert sum(value is not None for value in found[0]) > 20
    assert all(map(same, *found))


def test_ddp_averages_the_same_gradients():
    assert rank_processes.run(compared, 2) == [0, 0]


def test_blocks_are_compiled_once_and_not_for_each_copy():
    import torch._dynamo

    torch._dynamo.reset()
    module, plain = computed(recipe(), together=True), computed(recipe(), together=True)
    for block in blocks_of(module):
        block.compile(backend="aot_eager", dynamic=False)
    losses = [loss_of(module), loss_of(module)]
    with torch._dynamo.config.patch(error_on_recompile=True):
        losses.append(loss_of(module))
    losses[-1].backward()
    expected = loss_of(plain)
    expected.backward()
    torch.testing.assert_close(losses[-1], expected, rtol=1e-3, atol=1e-3)
    for one, other in zip(module.parameters(), plain.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
