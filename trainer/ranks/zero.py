"""ZeRO by DeepSpeed: stage 1 shards moments and float32 masters among ranks, 2 also gradients, 3 also weights.

DeepSpeed takes the steps. This module sets their learning rate and loss scale, and decides whether a step is taken.
DeepSpeed's own checkpoints tie a run to its ZeRO stage and world size, so they are not used: `Zero.held` returns views
of DeepSpeed's partitions instead.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from trainer.ranks.flat_ranges import FlatRange
from trainer.ranks.gate import Gate
from trainer.ranks.strategy import MOMENTS, PrecisionModule, Strategy, TrainedRange, fill_state, make_optimizer
from trainer.recipes.parallel import ParallelConfig
from trainer.recipes.schema import TrainConfig

_LINEAR = torch.nn.functional.linear


class Zero(Strategy):
    """A DeepSpeed engine around the module."""

    waits_for_steps = True

    def __init__(
        self,
        computed: PrecisionModule,
        settings: TrainConfig,
        config: ParallelConfig,
        *,
        stage: int,
        parts: int,
        micro: int,
    ) -> None:
        super().__init__(computed, settings)
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed reads it at every step, even with a single rank.
        deepspeed = _deepspeed(computed.device_type)
        self.stage = stage
        initial = {name: value.detach().float().cpu().clone() for name, value in self.learned.items()}
        base = make_optimizer(self.learned, settings, kind=_GatedAdamW)
        assert isinstance(base, _GatedAdamW)
        self.base = base
        options = _settings(computed, settings, config, stage=stage, parts=parts, micro=micro)
        if stage == 3:
            _shard_weights(deepspeed, computed, options)
        log = logging.getLogger("DeepSpeed")
        log.setLevel(logging.ERROR)  # DeepSpeed warns of every optimizer that is not its own.
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=computed, optimizer=base, config=options, dist_init_required=False
        )
        log.setLevel(logging.WARNING)
        self.wrapped = self.engine
        self._make_state()
        self._restore(initial)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """See `Strategy`."""
        if self.computed.dtype == torch.float16:
            self.optimizer.override_loss_scale(self.scale)
        self.engine.backward(loss, scale_wrt_gas=False)
        if not last:
            self.engine.step()  # This only counts the micro batch.

    def step(self, lr: float, gate: Gate) -> Tensor:
        """See `Strategy`."""
        for group in self.base.param_groups:
            group["lr"] = lr

        @cache
        def decision() -> tuple[float, bool]:
            # DeepSpeed steps the optimizer once per partition, after it has computed the global norm. The decision is
            # cached, so that all partitions take or skip the step together.
            norm = math.inf if self.optimizer.overflow else _norm(self.optimizer._global_grad_norm)
            return norm, gate.passes(norm)

        self.base.gate = lambda: decision()[1]
        self.engine.step()
        self.base.gate = _never
        return torch.tensor(decision()[0], dtype=torch.float64)

    def held(self) -> dict[str, TrainedRange]:
        """See `Strategy`."""
        ranges = self._range_3 if self.stage == 3 else self._range_12
        return {
            name: TrainedRange(ranges(value, None), {kind: ranges(value, kind) for kind in MOMENTS})
            for name, value in self.learned.items()
        }

    def refresh(self) -> None:
        """See `Strategy`."""
        optimizer = self.optimizer
        if self.stage < 3:
            optimizer.update_lp_params()
            return
        optimizer._partition_all_parameters()
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)

    def set_steps(self, steps: int) -> None:
        """See `Strategy`."""
        for state in self.base.state.values():
            state["step"].fill_(steps)

    def close(self) -> None:
        """See `Strategy`. DeepSpeed's hooks keep references to the engine, so this method empties its tensors."""
        self.engine.destroy()
        torch.nn.functional.linear = _LINEAR  # ZeRO-3 puts one of its own in this place, which rounds otherwise
        self.base.state.clear()
        if self.stage == 3:
            parts = [getattr(parameter, "ds_tensor", None) for parameter in self.computed.parameters()]
            _empty([*parts, *self.computed.parameters(), *vars(self.optimizer).values()])

    def _range_12(self, parameter: Any, kind: str | None) -> FlatRange:
        mapping = parameter._hp_mapping
        if mapping is None:
            device = self.optimizer.single_partition_of_fp32_groups[0].device
            return FlatRange(torch.zeros(0, device=device), tuple(parameter.shape))
        return FlatRange(
            mapping.get_hp_fragment(kind).detach(), tuple(parameter.shape), mapping.lp_fragment_address.start
        )

    def _range_3(self, parameter: Any, kind: str | None) -> FlatRange:
        optimizer = self.optimizer
        group, offset, numel = optimizer.grad_position[optimizer.get_param_id(parameter)]
        flat = optimizer.fp32_partitioned_groups_flat[group]
        whole = flat if kind is None else self.base.state[flat][kind]
        start = min(torch.distributed.get_rank() * numel, parameter.ds_numel)
        owned = min(numel, parameter.ds_numel - start)  # DeepSpeed pads the last partition.
        return FlatRange(whole.detach().narrow(0, offset, owned), tuple(parameter.ds_shape), start)

    def _make_state(self) -> None:
        optimizer = self.optimizer
        if self.stage == 3:
            fill_state(self.base, optimizer.fp32_partitioned_groups_flat)
        else:
            fill_state(self.base, optimizer.single_partition_of_fp32_groups)
            optimizer._lazy_init_hp_params_optimizer_state()

    def _restore(self, initial: dict[str, Tensor]) -> None:
        """Set the masters to the initial float32 weights: DeepSpeed made them from weights in lower precision."""
        for name, held in self.held().items():
            value = held.value
            value.data.copy_(initial[name].view(-1)[value.start : value.stop])
        self.refresh()


def _empty(value: Any) -> None:
    """Free the memory of all tensors in nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        value.data, value.grad = torch.empty(0, dtype=value.dtype, device=value.device), None
    elif isinstance(value, dict | list | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            _empty(each)


class _GatedAdamW(torch.optim.AdamW):
    """AdamW that skips its step unless `gate()` returns True, because DeepSpeed itself offers no way to skip one."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.gate: Callable[[], bool] = _never

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take the step if `gate()` returns True."""
        if self.gate():
            super().step(closure)


def _never() -> bool:
    return False


def _norm(value: Any) -> float:
    """Convert DeepSpeed's norm to a float: DeepSpeed reports a norm that is not finite as a negative number."""
    norm = float(value)
    return norm if norm >= 0 else math.inf


def _shard_weights(deepspeed: Any, computed: PrecisionModule, options: dict[str, Any]) -> None:
    """Shard weights among ranks one by one as they move to the device: the engine would first move all of them."""
    for parameter in computed.parameters():
        parameter.data = parameter.data.to(computed.dtype)
    deepspeed.zero.Init(module=computed, config_dict_or_path=options)
    layers: list[Any] = [module for module in computed.modules() if hasattr(module, "lora_magnitude_vector")]
    for layer in layers:  # DoRA reads its layer's weight, which ZeRO-3 would gather for the layer alone
        for magnitude in layer.lora_magnitude_vector.values():
            deepspeed.zero.register_external_parameter(magnitude, layer.get_base_layer().weight)


def _deepspeed(device_type: str) -> Any:
    """Import DeepSpeed for a device, without its log output and the operator that it would compile on a CPU."""
    os.environ.setdefault("DS_ACCELERATOR", device_type)
    # DeepSpeed calls torch's collectives by their deprecated names.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    import deepspeed

    log = logging.getLogger("DeepSpeed")
    log.setLevel(logging.WARNING)
    log.addFilter(_says_something_new)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_init_required=False)
    return deepspeed


def _says_something_new(record: logging.LogRecord) -> bool:
    """ZeRO-3 warns that it finds no tensors in `Inputs`; none of them has a gradient, so it need not find them."""
    return "unknown inputs or outputs type" not in record.getMessage()


def reduce_bucket(learned: int) -> int:
    """Return the size, in numbers, of DeepSpeed's bucket of gradients.

    DeepSpeed reduces a bucket once it is full, while the backward pass goes on. With its default of 5·10⁸, all
    gradients of a LoRA would wait for the end of the pass. It allocates the whole bucket.
    """
    return min(learned, 25_000_000)


def _settings(
    computed: PrecisionModule, settings: TrainConfig, config: ParallelConfig, *, stage: int, parts: int, micro: int
) -> dict[str, Any]:
    cuda = computed.device_type == "cuda"
    learned = sum(value.numel() for value in computed.parameters() if value.requires_grad)
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": cuda, "contiguous_gradients": True}
    zero["reduce_bucket_size"] = reduce_bucket(learned)
    if config.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": cuda}
    if config.offload == "all":
        zero["offload_param"] = {"device": "cpu", "pin_memory": cuda}
    lower: dict[torch.dtype, dict[str, Any]] = {
        torch.float32: {},
        torch.bfloat16: {"bf16": {"enabled": True}},
        torch.float16: {"fp16": {"enabled": True, "loss_scale": 1.0}},
    }
    return {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": parts,
        "gradient_clipping": settings.clip_norm or 0.0,  # 0 turns clipping off in DeepSpeed
        "zero_optimization": zero,
        "communication_data_type": config.gradient_precision,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**12,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device twice in each micro batch
        **lower[computed.dtype],
    }
