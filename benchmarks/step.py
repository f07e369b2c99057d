"""Count what one training step asks of a GPU: kernels, FLOPs and bytes, without a GPU: python benchmarks/step.py.

The stage's own module runs forward and backward on fake tensors, which have shapes and no memory, with CUDA's rules of
autocast. What is counted is what autograd sends to the device. Each operation that is no view and no allocation counts
as one kernel, which is a little less than what the device runs, as some operations launch two. Bytes are those of
inputs and outputs, as if nothing stayed in a cache. A kernel in Triton counts as one (`models.fused`), a copy of many
tensors as the kernels that torch packs it into. The few kernels of the optimizer are left out. The default is step 1 at
the size of the public Woosh release.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from models.fused.use import standing_in  # noqa: E402
from models.sizes import DiTConfig  # noqa: E402
from trainer import objectives  # noqa: E402
from trainer.formatting import aligned  # noqa: E402
from trainer.inputs import Inputs  # noqa: E402
from trainer.log.throughput import FlopCounter  # noqa: E402
from trainer.losses import Losses  # noqa: E402
from trainer.memory.activations import as_on_cuda, give_storage  # noqa: E402
from trainer.memory.outline import outlined_task  # noqa: E402
from trainer.ranks.strategy import DTYPES, PrecisionModule, blocks_of  # noqa: E402
from trainer.recipes.reading import load_recipe  # noqa: E402
from trainer.recipes.schema import Config  # noqa: E402

RELEASED = DiTConfig(
    channels=128,
    width=1024,
    depth=12,
    multistream_depth=6,
    heads=16,
    hidden_width=4096,
    text_width=1024,
    text_tokens=77,
)
AT_ONCE = {"tensors": 64, "chunks": 320, "numbers": 65_536}
"""The most that one kernel of a `_foreach_copy_` takes: tensors, and chunks of as many numbers (torch's
MultiTensorApply.cuh)."""
WITHOUT_KERNEL = {
    *("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "detach", "device"),
    *("_record_function_enter_new", "_record_function_exit", "promote_types"),
}


@dataclass
class Counts:
    """What a part of a step asks of the device."""

    kernels: Counter[str] = field(default_factory=Counter)
    views: int = 0
    bytes: Counter[str] = field(default_factory=Counter)
    flops: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.kernels + other.kernels, self.views + other.views, self.bytes + other.bytes, self.flops + other.flops
        )


class Counting(TorchDispatchMode):
    """Counts the operations that are dispatched inside a `with`."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        result = function(*arguments, **(options or {}))
        name, counts = function._overloadpacket.__name__, self.counts  # type: ignore[attr-defined]
        if name == "_unsafe_view" or _is_view(function):
            counts.views += 1
        elif name not in WITHOUT_KERNEL:
            self.launched(name, (arguments, options, result))
        return result

    def launched(self, name: str, values: Any) -> None:
        """Count a kernel that reads or writes all tensors in these values."""
        tensors = {id(leaf): leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)}
        self.counts.kernels[name] += _kernels_of_copies(values[0][0]) if name == "_foreach_copy_" else 1
        self.counts.bytes[name] += sum(leaf.numel() * leaf.element_size() for leaf in tensors.values())


def _kernels_of_copies(copies: list[Tensor]) -> int:
    """Return the number of kernels that fill these tensors, as torch packs them."""
    chunks = sum(-(-copy.numel() // AT_ONCE["numbers"]) for copy in copies)
    return max(-(-len(copies) // AT_ONCE["tensors"]), -(-chunks // AT_ONCE["chunks"]))


def _is_view(function: Any) -> bool:
    """Whether the result shares the memory of an argument, which is not written to."""
    returned = [value.alias_info for value in function._schema.returns]
    return any(alias is not None and not alias.is_write for alias in returned)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=8, help="clips of the micro batch (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=495, help="frames of a clip (default: %(default)s)")
    parser.add_argument("--stage", default="autoencode", help="default: %(default)s")
    parser.add_argument("--precision", default="bf16", choices=DTYPES)
    parser.add_argument("--base-precision", default="same", choices=("same", "fp8"))
    parser.add_argument("--top", type=int, default=12, help="operations to list (default: %(default)s)")
    options = parser.parse_args()
    precisions = [f"parallel.precision={options.precision}", f"parallel.base_precision={options.base_precision}"]
    overrides = ["autoencoder={kind: magnitude, folder: null}", *precisions]
    config = load_recipe("spresso_11hz", overrides, released=False)
    parts = count(config, options.stage, RELEASED, clips=options.clips, frames=options.frames)
    parts["both"] = parts["forward"] + parts["backward"]
    rows = [("", "kernels", "views", "GiB moved", "TFLOP")]
    for name, counts in parts.items():
        numbers = (counts.bytes.total() / 2**30, counts.flops / 1e12)
        rows.append((name, str(counts.kernels.total()), str(counts.views), *(f"{number:.2f}" for number in numbers)))
    print(aligned(rows))
    both = parts["both"]
    kernels = both.kernels.most_common(options.top)
    listed = [(name, str(number), f"{both.bytes[name] / 2**30:.2f}") for name, number in kernels]
    print(f"\n{aligned([('', 'kernels', 'GiB moved'), *listed])}")


def count(config: Config, stage: str, dit: DiTConfig, *, clips: int, frames: int) -> dict[str, Counts]:
    """Count the forward and the backward pass of one micro batch with D of these sizes."""
    task = outlined_task(config, stage, dit)
    dtype = DTYPES[config.parallel.precision]
    with FakeTensorMode():
        give_storage(task.module, dtype, lower_trained=False)
        for block in blocks_of(task.module):
            as_on_cuda(block)
        computed = PrecisionModule(task.module, torch.device("cpu"), dtype)
        computed.cast_together()
        as_on_cuda(computed)
        for norm in computed.modules():
            if isinstance(norm, nn.RMSNorm):
                norm.forward = partial(_one_kernel, norm)  # type: ignore[method-assign]
        objectives.normal = lambda keys, *shape: one_draw(keys, list(shape))
        conditions = {name: value for reader in task.conditions() for name, value in reader.blank(clips).items()}
        x0_BCT = torch.zeros(clips, dit.channels, frames)
        positions = torch.arange(clips)
        draws = task.module.draws(positions)  # in host memory
        inputs = Inputs(x0=x0_BCT, positions=positions, draws=draws, conditions=conditions)
        with FlopCounter() as flops, Counting() as forward, standing_in(forward.launched):
            loss = Losses(*computed(inputs)).total({}).mean()
        forward.counts.flops = flops.found.total()
        with FlopCounter() as flops, Counting() as backward, standing_in(backward.launched):
            loss.backward()
        backward.counts.flops = flops.found.total()
    return {"forward": forward.counts, "backward": backward.counts}


def _one_kernel(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    """Compute an RMSNorm as one operation, as CUDA does; on the CPU torch computes it in several."""
    return rms_norm(x.float(), norm.weight.float(), norm.eps or 0.0)[0]


@torch.library.custom_op("step::normal", mutates_args=())
def one_draw(keys: Tensor, shape: list[int]) -> Tensor:
    """Return the noise that one kernel draws on CUDA, as a shape; on the CPU it takes about 280 operations."""
    raise NotImplementedError


@torch.library.custom_op("step::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the normalised x and what the backward pass needs, as shapes."""
    raise NotImplementedError


@torch.library.custom_op("step::rms_norm_backward", mutates_args=())
def rms_norm_backward(gradient: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and weight, as shapes."""
    raise NotImplementedError


one_draw.register_fake(lambda keys, shape: torch.empty(len(keys), *shape))
rms_norm.register_fake(lambda x, weight, eps: (torch.empty_like(x), x.new_empty(x.shape[:-1])))
rms_norm_backward.register_fake(lambda gradient, x, weight, scale: (torch.empty_like(x), torch.empty_like(weight)))
rms_norm.register_autograd(
    lambda context, gradient, _: (*rms_norm_backward(gradient, *context.saved_tensors), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:2], output[1]),
)


if __name__ == "__main__":
    main()
