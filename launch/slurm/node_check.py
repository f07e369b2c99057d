"""Checks a compute node: `python -m launch.slurm.node_check GPUS TRACKERS`, started by `launch.slurm.preflight`.

This module imports nothing that the node may lack, so that it can name what is missing.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.slurm.variables import RUN

_NEEDED = ("torch", "accelerate", "deepspeed", "peft", "safetensors", "omegaconf", "trainer.recipes.reading")

_TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")  # those of log.trackers, each the name of its package


def look(gpus: bool, trackers: Sequence[str] = ()) -> list[str]:
    """Return what this compute node lacks, one line each.

    Args:
        gpus: whether torch must find GPUs.
        trackers: those of the recipe, each the name of its package.
    """
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
    for name in trackers:
        if name in _TRACKERS and importlib.util.find_spec(name) is None:
            found.append(
                f"a compute node has no package {name} for log.trackers: run `pip install 'spresso[trackers]'` in the "
                f"environment of {sys.executable}, or take {name} out of log.trackers"
            )
    if not found:
        from launch.slurm.node_health import faults_here

        found += [f"a compute node: {fault}" for fault in faults_here(int(gpus))[0]]
    if gpus and not found:
        import torch

        if not torch.cuda.is_available():
            found.append("torch does not find the GPUs of a compute node: is this a CPU build of torch?")
    return found


if __name__ == "__main__":
    missing = look(gpus=sys.argv[1] == "1", trackers=sys.argv[2:])
    print("\n".join(["spresso: missing", *missing]) if missing else "spresso: all is there")
