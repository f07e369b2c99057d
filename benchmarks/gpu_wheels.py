"""Fetch what a bare machine with a GPU lacks for `gpu.py`: python benchmarks/gpu_wheels.py FOLDER [--deepspeed].

Run it where there is a network, and carry the folder to the machine with the GPU, where `gpu.py --wheels FOLDER`
unpacks the wheels by itself, without pip. They are for CPython 3.12 on Linux (x86_64). Such a machine has torch with
CUDA, numpy, accelerate, peft and tensorboard already: no requirement of a wheel is followed, so that nothing of these
is fetched, and torch least of all.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

NEEDED = (
    *("omegaconf==2.4.0", "msgspec==0.22.0", "isal==1.9.1"),
    *("soundfile==0.14.0", "cffi==2.1.1", "pycparser==3.12", "soxr==1.1.0"),
)
DEEPSPEED = (
    *("msgpack==1.2.4", "ninja==1.13.2", "einops==0.8.2"),
    *("pydantic==2.14.4", "pydantic-core==2.50.5", "annotated-types==0.8.0", "typing-inspection==0.4.5"),
)
DEEPSPEED_SOURCES = ("deepspeed==0.19.8", "hjson==3.1.0", "py-cpuinfo==9.0.0")
"""Packages without a wheel on the index, or whose wheel is built here: pure Python, for any machine."""
MOST_MIB = 60
_PYTHON = ("--python-version=3.12", "--implementation=cp", "--abi=cp312", "--abi=abi3", "--abi=none")
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "any")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the wheels are put")
    parser.add_argument("--deepspeed", action="store_true", help="also DeepSpeed, for the strategies zero1 to zero3")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    fetch(options.folder, [*NEEDED, *(DEEPSPEED if options.deepspeed else ())])
    if options.deepspeed:
        build(options.folder, DEEPSPEED_SOURCES)
    mib = sum(path.stat().st_size for path in options.folder.glob("*.whl")) / 2**20
    print(f"{options.folder} holds {len(list(options.folder.glob('*.whl')))} wheels of {mib:.1f} MiB")
    if mib > MOST_MIB:
        raise SystemExit(f"that is more than {MOST_MIB} MiB: something large has come along")


def fetch(folder: Path, packages: Sequence[str]) -> None:
    """Download the wheels of these packages, and of no others, for the machine with the GPU."""
    platforms = [f"--platform={name}" for name in _PLATFORMS]
    _pip("download", "--no-deps", "--only-binary=:all:", *_PYTHON, *platforms, f"--dest={folder}", *packages)


def build(folder: Path, packages: Sequence[str]) -> None:
    """Build the wheels of packages that are pure Python, without the compiled operators that DeepSpeed may have."""
    _pip("wheel", "--no-deps", f"--wheel-dir={folder}", *packages)


def unpack(wheels: Path, folder: Path) -> None:
    """Unpack wheels into a folder that can be put on Python's path; raises SystemExit if there are none."""
    found = sorted(wheels.glob("*.whl"))
    if not found:
        raise SystemExit(f"{wheels} holds no wheels: fetch them with python benchmarks/gpu_wheels.py {wheels}")
    for wheel in found:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)


def _pip(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", "--quiet", *arguments], check=False)
    if done.returncode:
        raise SystemExit("pip failed, see above")


if __name__ == "__main__":
    main()
