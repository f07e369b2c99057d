"""What a rank needs, imported once by the server that ranks are forked from."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

import trainer.loop
import trainer.ranks.fsdp  # noqa: F401

torch.set_num_threads(1)
