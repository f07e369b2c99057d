"""The settings of a recipe for ranks, devices and precision."""

from __future__ import annotations

from dataclasses import dataclass

from models.ranges import ranged


@dataclass
class ParallelConfig:
    """How ranks share the work. None of these settings changes what is learned."""

    strategy: str = "ddp"
    """`ddp`: each rank holds everything; `zero1`, `zero2`, `zero3` (DeepSpeed): moments, then also gradients, then also
    weights are sharded; `fsdp2` (torch): all three are sharded."""
    processes: int = ranged(1, least=1)
    """Ranks to start on this machine. Under torchrun or SLURM, their number of ranks is used instead."""
    replicas: int = ranged(1, least=1)
    """`fsdp2` only: number of groups of ranks. Each group holds a full copy of the trained weights, sharded within the
    group (HSDP). With one group per node, weights are gathered within a node alone."""
    micro_batch: int | None = ranged(None, least=1, note="null: no accumulation")
    """Clips per forward pass of one rank; gradients are accumulated up to the global batch. None: no accumulation."""
    precision: str = "fp32"
    """Data type of the computation: `fp32`, `bf16` or `fp16` (with loss scaling). The trained weights stay float32; a
    frozen base is stored in this type."""
    base_precision: str = "same"
    """Data type of D's frozen base in `autoencode` and `finetune`: `same` is that of `precision`; `fp8` holds the
    linear layers of its blocks, and those with a LoRA, as 8-bit floats with a scale for each output channel, and
    multiplies 8-bit inputs. It needs precision=bf16, and a GPU of compute capability 8.9 or newer; a CPU computes the
    same, slowly. Off by default, because it rounds more coarsely: docs/parallel.md has the measured cost."""
    gradient_precision: str = "fp32"
    """Data type in which ranks exchange gradients: `fp32`, or `bf16`, which halves the traffic between nodes and rounds
    each gradient to three digits. With `zero3` and `fsdp2`, weights are exchanged in `precision`."""
    shard_base: bool = False
    """`fsdp2` only: shard the frozen base too, which otherwise each rank holds in full. `zero3` always shards it."""
    offload: str = "none"
    """`zero1` to `zero3`: `optimizer` keeps moments and master weights in host memory; `all` (`zero3` only) keeps the
    sharded weights there too."""
    checkpoint_activations: bool = False
    """Recompute each block's activations in the backward pass: far less memory for a third more compute."""
    compile: bool | None = None
    """Compile each block with torch.compile: the first step takes minutes, later steps are faster. null: on CUDA, if
    Triton and a C compiler exist and the strategy is not `zero3`; a block that cannot be compiled runs as it is."""
    graph: bool = False
    """Record the forward and backward pass of a micro batch as CUDA graphs and replay them, so that the host launches a
    pass at once. This helps if the host is slower than the GPU, with few clips per GPU, and gives the same result. It
    needs a GPU, strategy=ddp and no checkpoint_activations. Up to eight shapes of micro batches are recorded, each in
    seconds; others run without. Ranks exchange gradients after the backward pass, not during it."""
    device: str = "auto"
    """`auto` (CUDA if available), `cpu` or `cuda`."""
    threads: int | None = ranged(None, least=1, most=4_096)
    """CPU threads per rank; None: OMP_NUM_THREADS, or the cores that the process may use / ranks on this machine."""
    gpu_gib: float = ranged(80.0, above=0)
    """Memory of a GPU in GiB that `spresso plan` assumes on a machine without one."""
