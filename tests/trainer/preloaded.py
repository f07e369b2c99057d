"""What a rank needs, imported once by the server that ranks are forked from. No rank pickles what it sends."""

import os
from typing import NoReturn

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist

import trainer.loop
import trainer.ranks.fsdp  # noqa: F401

torch.set_num_threads(1)


def _refuse(*unused: object) -> NoReturn:
    raise AssertionError("a rank pickles")


for name in ("_object_to_tensor", "_tensor_to_object"):
    assert hasattr(dist.distributed_c10d, name)
    setattr(dist.distributed_c10d, name, _refuse)
