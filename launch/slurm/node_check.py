"""Checks a compute node: `python -m launch.slurm.node_check GPUS`, which `launch.slurm.preflight` starts on it.

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
    """Return what this compute node lacks, one line each; `gpus`: whether torch must find GPUs."""
    run = Path(os.environ[RUN])
    if not run.is_dir():
        return [
            f"a compute node does not see {run}: set run_dir to a folder on a disk that all nodes share, "
            "and bind it into the image of cluster.container, if there is one"
        ]
    found = []
    for name in _NEEDED:
        try:
            importlib.import_module(name)
        except Exception as error:
            found.append(
                f"a compute node can't import {name} with {sys.executable}: {error} "
                "(see cluster.setup, .python, .container)"
            )
    if gpus and not found:
        import torch

        if not torch.cuda.is_available():
            found.append("torch does not find the GPUs of a compute node: is this a CPU build of torch?")
    return found


if __name__ == "__main__":
    missing = look(gpus=sys.argv[1] == "1")
    print("\n".join(["spresso: missing", *missing]) if missing else "spresso: all is there")
