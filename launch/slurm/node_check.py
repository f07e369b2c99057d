"""What a compute node lacks: `python -m launch.slurm.node_check GPUS`, which `launch.slurm.preflight` starts there.

This module imports nothing that the node may lack, so that it can name what is missing.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

from launch.slurm.variables import RUN

_NEEDED = ("torch", "accelerate", "deepspeed", "peft", "safetensors", "omegaconf", "trainer.recipes.reading")


def look(gpus: bool) -> list[str]:
    """On a compute node: what is missing."""
    run = Path(os.environ[RUN])
    if not run.is_dir():
        return [f"a compute node does not see {run}: take a run_dir=… on a disk that all nodes share"]
    found = []
    for name in _NEEDED:
        try:
            importlib.import_module(name)
        except Exception as error:
            found.append(
                f"a compute node can't import {name} with {sys.executable}: {error} (see cluster.setup, .python)"
            )
    if gpus and not found:
        import torch

        if not torch.cuda.is_available():
            found.append("a compute node has GPUs that torch does not find: is this a CPU build of torch?")
    return found


if __name__ == "__main__":
    missing = look(gpus=sys.argv[1] == "1")
    print("\n".join(["spresso: missing", *missing]) if missing else "spresso: all is there")
