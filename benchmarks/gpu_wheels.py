"""Fetch what a bare machine with a GPU lacks for `gpu.py`: python benchmarks/gpu_wheels.py FOLDER [--deepspeed].

Run it where there is a network. The wheels are for CPython 3.12 on Linux (x86_64). The other machine has torch, numpy,
accelerate, peft, transformers and tensorboard already; no wheel's own requirements are followed, so that nothing of
these, and torch least of all, is fetched. `gpu.py --wheels FOLDER` unpacks the wheels by itself, without pip.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

NEEDED = (
    *("omegaconf==2.4.0", "msgspec==0.22.0", "isal==1.9.1", "fsspec==2026.7.0", "PyYAML==6.0.3"),
)
DEEPSPEED = ("deepspeed==0.19.8",)
MOST_MIB = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--deepspeed", action="store_true", help="also DeepSpeed, for the strategies zero1 to zero3")
    options = parser.parse_args()
    fetch(NEEDED, options.folder)


if __name__ == "__main__":
    main()
