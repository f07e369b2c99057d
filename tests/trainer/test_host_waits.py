"""No stage's forward and backward pass, and no step, asks the host to wait for the device.

On a GPU, an operation whose result has a size that depends on values, or a number that Python reads, stops the host
until the device has caught up. The passes run on the CPU, where the same operations are counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

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
OF_UNKNOWN_SIZE = {"_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "bincount", "equal"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


class Waits(TorchDispatchMode):
    """Lists the operations inside a `with` that wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._reads = _Reads(self.found)

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


class _Reads(TorchFunctionMode):
    """Lists the calls that bring a tensor's values to Python without an operation of their own."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        if function in READS:
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
