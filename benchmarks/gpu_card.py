"""The section of `gpu.py` on the card itself: what it is, and the rates that it reaches."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Mapping
from datetime import UTC, datetime

import torch
from gpu_cases import Case, NotAvailable, Row, Setting
from gpu_training import times
from torch import Tensor

from trainer.ranks.compiling import find_missing

PACKAGES = ("torch", "triton", "numpy", "accelerate", "peft", "deepspeed", "omegaconf", "isal", "msgspec", "soundfile")


def cases(setting: Setting) -> Mapping[str, Case]:
    """Return the cases: what is here, then matrix products, then copies."""
    return {
        "machine": lambda row: _machine(row, setting),
        "versions": _versions,
        "matrix product, bf16": lambda row: _product_bf16(row, setting),
        "matrix product, fp8": lambda row: _product_fp8(row, setting),
        "copies": lambda row: _copies(row, setting),
    }


def _machine(row: Row, setting: Setting) -> None:
    here = {"date": datetime.now(UTC).date().isoformat(), "cores": os.cpu_count(), "CPU": platform.machine()}
    if setting.device == "cpu":
        row("machine", card="none (CPU)", **here)
        return
    found = torch.cuda.get_device_properties(0)
    row(
        "machine",
        card=found.name,
        GiB=found.total_memory / 2**30,
        capability=f"{found.major}.{found.minor}",
        multiprocessors=found.multi_processor_count,
        driver=_driver(),
        compiling=f"not possible: {lacking} is missing" if (lacking := find_missing()) else "possible",
        **here,
    )


def _driver() -> str:
    asked = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        return f"unknown ({type(error).__name__})"


def _versions(row: Row) -> None:
    row("versions", Python=platform.python_version(), CUDA=torch.version.cuda or "none", **_packages())


def _packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def _product_bf16(row: Row, setting: Setting) -> None:
    """Time products as large as a card likes them, and one as D's MLP has it at 32 clips."""
    for name, (rows, inner, columns) in _shapes(setting).items():
        x = torch.randn(rows, inner, device=setting.device, dtype=torch.bfloat16)
        weight = torch.randn(columns, inner, device=setting.device, dtype=torch.bfloat16)
        _rate(row, f"bf16, {name}", lambda x=x, weight=weight: x @ weight.T, 2 * rows * inner * columns, setting)


def _product_fp8(row: Row, setting: Setting) -> None:
    if not hasattr(torch, "_scaled_mm"):
        raise NotAvailable("this torch has no _scaled_mm")
    for name, (rows, inner, columns) in _shapes(setting).items():
        x = torch.randn(rows, inner, device=setting.device).to(torch.float8_e4m3fn)
        weight = torch.randn(columns, inner, device=setting.device).to(torch.float8_e4m3fn)
        scales = {
            "a tensor": (torch.ones((), device=setting.device), torch.ones((), device=setting.device)),
            "a row": (torch.ones(rows, 1, device=setting.device), torch.ones(1, columns, device=setting.device)),
        }
        for how, (of_x, of_weight) in scales.items():

            def product(x: Tensor = x, weight: Tensor = weight, a: Tensor = of_x, b: Tensor = of_weight) -> Tensor:
                return torch._scaled_mm(x, weight.T, scale_a=a, scale_b=b, out_dtype=torch.bfloat16)

            _rate(row, f"fp8, a scale for {how}, {name}", product, 2 * rows * inner * columns, setting)


def _shapes(setting: Setting) -> dict[str, tuple[int, int, int]]:
    if setting.small:
        return {"tiny": (32, 16, 32)}
    return {"square": (8192, 8192, 8192), "D's MLP at 32 clips": (32 * 496, 1024, 4096)}


def _rate(row: Row, name: str, product: Callable[[], Tensor], flops: int, setting: Setting) -> None:
    seconds = _seconds(product, setting)
    row(name, **{"ms": 1000 * seconds, "TFLOP/s": flops / seconds / 1e12})


def _copies(row: Row, setting: Setting) -> None:
    count = 2**16 if setting.small else 2**30
    host = torch.zeros(count, dtype=torch.uint8, pin_memory=setting.device == "cuda")
    pageable, here = torch.zeros(count, dtype=torch.uint8), torch.zeros(count, dtype=torch.uint8, device=setting.device)
    there = torch.empty_like(here)
    ways = {
        "host to device, pinned": (lambda: here.copy_(host, non_blocking=True), 1),
        "host to device, pageable": (lambda: here.copy_(pageable), 1),
        "device to host, pinned": (lambda: host.copy_(here, non_blocking=True), 1),
        "within the device, read and written": (lambda: there.copy_(here), 2),
    }
    for name, (copy, times_moved) in ways.items():
        seconds = _seconds(copy, setting)
        row(name, **{"ms": 1000 * seconds, "GB/s": times_moved * count / seconds / 1e9})


def _seconds(work: Callable[[], object], setting: Setting) -> float:
    times(work, setting.device, count=3)
    return statistics.median(times(work, setting.device, count=10))
