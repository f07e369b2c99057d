"""The section of `gpu.py` with two ranks on one card, over Gloo, because NCCL refuses two ranks on one device."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from datetime import timedelta
from functools import partial
from typing import Any
from unittest import mock

import torch.distributed as dist
from accelerate.state import DistributedType, PartialState
from gpu_cases import Case, Row, Setting
from gpu_runs import BATCH, furthest, losses, require_success, short_recipe, start, train_short
from ranks import free_port
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainer.ranks.parallel import Parallel
from trainer.recipes.schema import Config

WORLD_SIZE = 2
STRATEGIES = {"ddp": (), "ddp, graph": ("parallel.graph=true",)}


def cases(setting: Setting) -> Mapping[str, Case]:
    """Return a case for each strategy; Gloo reduces on a device for DDP, not for the others."""
    return {name: partial(_measure, name=name, setting=setting) for name in STRATEGIES}


def _measure(row: Row, name: str, setting: Setting) -> None:
    """Compare the curve of two ranks with that of one."""
    one = short_recipe(setting, f"{name} one rank")
    two = short_recipe(setting, f"{name} two ranks", *STRATEGIES[name])
    require_success("one rank", start(train_short, setting, one))
    port = free_port()
    require_success("two ranks", *(start(_as_rank, setting, two, rank, port) for rank in range(WORLD_SIZE)))
    ours = losses(two)
    row(name, steps=max(ours) // BATCH, **{"largest relative difference": furthest(ours, losses(one))})


class OlderDDP(DistributedDataParallel):
    """DDP before torch 2.13, with the name that the product's argument had then."""

    def __init__(self, *arguments: Any, forward_sync_buffers: bool, **options: Any) -> None:
        super().__init__(*arguments, broadcast_buffers=forward_sync_buffers, **options)


def _as_rank(setting: Setting, config: Config, rank: int, port: int) -> None:
    on_card = setting.device == "cuda"
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(WORLD_SIZE), "LOCAL_WORLD_SIZE": str(WORLD_SIZE)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": "0" if on_card else str(rank)}
    if "forward_sync_buffers" not in inspect.signature(DistributedDataParallel).parameters:
        nn.parallel.DistributedDataParallel = OlderDDP  # type: ignore[misc]
    if not on_card:
        train_short(setting, config)
        return
    dist.init_process_group("gloo", timeout=timedelta(minutes=2))
    with (  # Accelerate takes NCCL for whatever trains on a GPU, and names the device at a barrier
        mock.patch.object(PartialState, "_prepare_backend", return_value=("gloo", DistributedType.MULTI_GPU)),
        mock.patch.object(Parallel, "wait", side_effect=dist.barrier),
    ):
        train_short(setting, config)
