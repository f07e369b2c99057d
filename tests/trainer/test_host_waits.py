"""No stage's forward and backward pass, and no step, asks the host to wait for the device.

On a GPU, an operation whose result has a size that depends on values, or a number that Python reads, stops the host
until the device has caught up. The passes run on the CPU, where the same operations are counted.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from models.sizes import StableAudioConfig
from trainer.feed import Feed
from trainer.inputs import Inputs
from trainer.loop import train, train_step
from trainer.memory.outline import OutlinedModels
from trainer.objectives import Objective
from trainer.ranks.frozen_base import convert_base
from trainer.ranks.readback import Readback
from trainer.stop import Stop
from trainer.tasks import make_task
from trainer.training import set_up

READS = {Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__}
MADE = {torch.tensor, torch.as_tensor, torch.from_numpy}
OF_UNKNOWN_SIZE = {"_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "bincount", "equal"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


class Waits(TorchDispatchMode):
    """Lists the operations inside a `with` that wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._reads = _Calls(READS, self.found)

    def __enter__(self) -> Waits:
        self._reads.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._reads.__exit__(*error)

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        name = function._overloadpacket.__name__  # type: ignore[attr-defined]
        masked = name in INDEXING and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in arguments[1]
        )
        if name in OF_UNKNOWN_SIZE or masked:
            self.found.append(name)
        return function(*arguments, **(options or {}))


class _Calls(TorchFunctionMode):
    """Lists the calls of functions that bring values to Python, or from there, without an operation of their own."""

    def __init__(self, functions: set[Callable[..., Any]], found: list[str]) -> None:
        super().__init__()
        self.functions, self.found = functions, found

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        if function in self.functions:
            self.found.append(function.__name__)
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("stage", ["pretrain", "autoencode", "quantize", "prior", "finetune", "distill"])
@pytest.mark.parametrize("kind", ["residual", "qinco2", "fsq"])
def test_a_pass_reads_nothing_back(stage, kind, tiny):
    if kind == "qinco2":
        chosen = ("quantizer.kind=qinco2", "quantizer.books=3", "quantizer.size=32", "quantizer.rates=[3,1]")
    elif kind == "fsq":
        chosen = ("quantizer.kind=fsq", "quantizer.books=4", "quantizer.size=16", "quantizer.rates=[4]")
    else:
        chosen = ("quantizer.kind=residual", "quantizer.books=3", "quantizer.size=32", "quantizer.rates=[3,1]")
    asked = [
        f"{name}.{key}" for name in ("prior", "distill") for key in ("samples=8", "global_batch=8", "crop_frames=63")
    ]
    config = tiny(*chosen, *asked, "distillation.steps=[2,1]")
    task = make_task(config, stage, models=OutlinedModels(config, config.dit))
    positions_B = torch.arange(6)
    x0_BCT = torch.randn(6, config.dit.channels, config.stage(stage).crop_frames)
    mask_BT = torch.ones(6, x0_BCT.shape[-1], dtype=torch.bool)
    mask_BT[2, 20:] = False
    inputs = Inputs(x0=x0_BCT, positions=positions_B, mask=mask_BT).to(x0_BCT.device, task.module.draws(positions_B))
    with Waits() as waits:
        task.module(inputs).total({}).mean().backward()
    assert waits.found == []


def test_a_pass_on_a_base_in_fp8_reads_nothing_back(tiny):
    config = tiny("parallel.precision=bf16", "parallel.base_precision=fp8")
    task = make_task(config, "autoencode", models=OutlinedModels(config, config.dit))
    convert_base(task.module, config.parallel, torch.device("cpu"))
    inputs = Inputs(x0=torch.randn(2, config.dit.channels, 63), positions=torch.arange(2))
    with Waits() as waits:
        task.module(inputs).total({}).mean().backward()
    assert waits.found == []


class HostTensors(TorchDispatchMode):
    """Lists the operations inside a `with` that read or make a tensor in host memory."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._made = _Calls(MADE, self.found)

    def __enter__(self) -> HostTensors:
        self._made.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._made.__exit__(*error)

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        result = function(*arguments, **(options or {}))
        leaves = [leaf for leaf in tree_leaves((arguments, options, result)) if isinstance(leaf, Tensor)]
        if any(leaf.device.type == "cpu" for leaf in leaves):
            self.found.append(str(function))
        return result


PASSES: dict[str, tuple[str, tuple[str, ...]]] = {
    **{stage: (stage, ()) for stage in ("pretrain", "autoencode", "prior")},
    **{
        f"{stage} with {kind}": (stage, (f"quantizer.kind={kind}",))
        for stage in ("quantize", "finetune")
        for kind in ("residual", "qinco2", "fsq")
    },
    **{f"autoencode with {kind}": ("autoencode", (f"lora.variant={kind}",)) for kind in ("dora", "pissa", "rslora")},
    **{
        f"pretrain by {name}": ("pretrain", (f"diffusion={{name: {name}, options: {{}}}}",))
        for name in ("flow_matching", "v_prediction")
    },
    "pretrain with text": ("pretrain", ("dit.text_width=16", "dit.text_tokens=7", "dit.multistream_depth=1")),
    "edm": ("pretrain", ("diffusion={name: edm, options: {}}",)),
    "autoencode on Stable Audio's D": ("autoencode", ()),
}


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_touches_no_host_memory(name, tiny, monkeypatch):
    """A CUDA graph repeats what the device did alone: a number from host memory would be that of the first batch.

    The device is `meta`, which has no autocast.
    """
    stage, overrides = PASSES[name]
    sizes = ("quantizer.books=4", "quantizer.size=16", "quantizer.rates=[4]")
    config = tiny(*sizes, "prior.samples=8", "prior.global_batch=8", "prior.crop_frames=63", *overrides)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    device = torch.device("meta")
    stable_audio = StableAudioConfig(channels=128, depth=1, heads=2, head_width=16, text_heads=1)
    dit = stable_audio if "Stable Audio" in name else config.dit
    with device:
        task = make_task(config, stage, models=OutlinedModels(config, dit))
    for module in task.modules():
        module.to(device)
    positions_B = torch.arange(6)
    x0_BCT = torch.randn(6, config.dit.channels, config.stage(stage).crop_frames)
    mask_BT = torch.ones(6, x0_BCT.shape[-1], dtype=torch.bool)
    tokens = {"text": torch.randn(6, 7, 16), "text_mask": torch.ones(6, 7, dtype=torch.bool)} if "text" in name else {}
    inputs = Inputs(x0=x0_BCT, positions=positions_B, mask=mask_BT, conditions=tokens)
    inputs = inputs.to(device, task.module.draws(positions_B))
    with HostTensors() as host:
        task.module(inputs).total({}).mean().backward()
    assert host.found == []


@pytest.mark.parametrize(
    "work",
    [lambda: torch.tensor([1.0, 2.0], device="meta"), lambda: torch.ones(2, device="meta") + torch.ones(())],
    ids=["a tensor of Python's numbers", "a number in host memory"],
)
def test_host_memory_is_found(work):
    with HostTensors() as host:
        torch.arange(2, device="meta") * 2
        assert host.found == []
        work()
    assert host.found


def test_what_waits_is_found():
    values = torch.arange(4)
    with Waits() as waits:
        values[values > 1]
        values[values > 1] = 0
        bool(values.any())
        values.tolist()
        float(values[0])
        values[torch.tensor([0, 1])]
    assert waits.found == ["index", "index_put_", "_local_scalar_dense", "tolist", "_local_scalar_dense"]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("stage", ["pretrain", "autoencode"])
def test_a_whole_step_reads_back_the_step_before_alone(stage, strategy, tiny, monkeypatch):
    """What happens in host memory does not count: reading the batch and drawing for it."""
    config = tiny(
        *("pretrain.samples=32", "autoencode.samples=32", "log.every=1000", "log.samples_every=0"),
        *(f"parallel.strategy={strategy}", "parallel.micro_batch=4", "checkpoint.every=1000"),
    )
    if stage == "autoencode":
        assert train(config, "pretrain") == "done"
    read: list[list[float]] = []

    def unwatched(plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            with _disable_current_modes(), torch._C.DisableTorchFunction():
                return plain(*arguments)

        return call

    monkeypatch.setattr(Feed, "next", unwatched(Feed.next))
    monkeypatch.setattr(Objective, "draws", unwatched(Objective.draws))
    plain = Readback.read
    monkeypatch.setattr(Readback, "read", unwatched(lambda self: read.append(plain(self)) or read[-1]))
    with set_up(config, stage, Stop(), lambda: None) as training:
        for number in range(3):
            with Waits() as waits:
                assert train_step(training) is not None
            assert waits.found == []
            assert len(read) == number
        training.settle()
        assert training.grad_norm == read[-1][1] > 0
