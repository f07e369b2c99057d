"""Measure what only a GPU can show, in ten minutes on one card, the most important first.

    python benchmarks/gpu_wheels.py wheels           on a machine with a network: fetches what the other one lacks
    python benchmarks/gpu.py --wheels wheels         on the machine with the card, which needs no network
    python benchmarks/gpu.py --device cpu --small    runs everything with tiny sizes, to see that it works

Each row is printed and written to `--out` as soon as it is measured, and `--out` with the suffix .md has the tables. A
case that fails has a row with its error, and what there was no time for has a row, too. Each case's own output is in
the folder `--out` with the suffix .logs.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from gpu_cases import Section, Setting, forks_may_use_cuda, run_section  # noqa: E402
from gpu_report import Report  # noqa: E402
from gpu_wheels import unpack  # noqa: E402

SECTIONS = (
    Section("card", "gpu_card"),
    Section("keyed numbers", "gpu_numbers"),
    Section("data", "gpu_data"),
    Section("hidden waits", "gpu_waits"),
    Section("released size", "gpu_sizes", share=0.6),
    Section("peers", "gpu_peers"),
    Section("mends", "gpu_mends"),
    Section("strategies", "gpu_strategies"),
    Section("save, kill, resume", "gpu_resume", share=0.7),
    Section("two ranks on one card", "gpu_two_ranks", share=1.0),
)
IMPORTED = ("torch", "numpy", "peft", "accelerate", "trainer.loop", "trainer.tasks", "trainer.memory.estimate")
"""What most cases need: imported once, before processes are forked."""
PREPARES = "data"
"""The section without which others cannot run."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument("--out", type=Path, default=Path("gpu.jsonl"), help="a new file (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=10.0, help="no longer than this (default: %(default)s)")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels that gpu_wheels.py fetched")
    names = [section.name for section in SECTIONS]
    parser.add_argument("--sections", nargs="*", default=names, choices=names, metavar="SECTION", help="default: all")
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"{options.out} exists: name another --out, or move the file away")
    with tempfile.TemporaryDirectory(prefix="spresso-gpu-") as work:
        run(options, Path(work))


def run(options: argparse.Namespace, work: Path) -> None:
    """Run the sections that are asked for."""
    deadline = time.monotonic() + 60 * options.minutes
    os.environ |= _environment(work)
    if options.wheels is not None:
        unpack(options.wheels, work / "packages")
        sys.path.append(str(work / "packages"))  # last, so that the machine's own packages come first
    report = Report(options.out)
    setting = Setting(work, options.out.with_suffix(".logs"), options.device, options.small)
    _import_once(report)
    method = "fork" if options.device == "cpu" or forks_may_use_cuda() else "spawn"
    for section in SECTIONS:
        if section.name in (*options.sections, PREPARES):
            run_section(section, setting, report, deadline=deadline, method=method)


def _environment(work: Path) -> dict[str, str]:
    """Return the variables of all processes."""
    given = [path for path in (os.environ.get("PYTHONPATH"),) if path]
    here = [str(ROOT), str(ROOT / "benchmarks"), *given, str(work / "packages")]
    return {
        **{"PYTHONPATH": os.pathsep.join(here)},
        **{"PYTHONWARNINGS": "ignore", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"},
        # Whether there is a device is asked of the driver, because a fork of a process that has used CUDA may not.
        **{"PYTORCH_NVML_BASED_CUDA_CHECK": "1"},
        # What is compiled for one case serves the next, and leaves nothing in the home directory.
        **{"TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"), "TRITON_CACHE_DIR": str(work / "triton")},
    }


def _import_once(report: Report) -> None:
    """Import what the cases need. What is missing has a row, and fails the cases that need it."""
    for name in IMPORTED:
        try:
            __import__(name)
        except Exception as error:
            report.note("card", f"import {name}", "error", error)


if __name__ == "__main__":
    main()
