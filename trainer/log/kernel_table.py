"""The table beside a trace: how long each part of a step took, and which kernels cost most."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch.autograd import DeviceType

from trainer.formatting import aligned

STEP_PARTS = ("data", "forward", "backward", "optimizer", "average")
"""The parts of a step that a trace shows as ranges, in order."""
_NAME = 90  # characters of a kernel's name; those of templates go on for hundreds
_ANNOTATION = "ProfilerStep"  # the profiler's own range around each step


def kernel_table(averages: Iterable[Any], *, steps: int, on_device: bool, kernels: int = 25) -> str:
    """Return the table of a trace.

    Args:
        averages: the profiler's `key_averages()`.
        steps: how many steps were traced.
        on_device: whether to list the kernels of the device; otherwise, the operations on the CPU.
        kernels: how many kernels have a row of their own.
    """
    entries = list(averages)
    return f"{_parts(entries, steps)}\n\n{_kernels(entries, steps, on_device=on_device, most=kernels)}\n"


def kernel_costs(averages: Iterable[Any], *, on_device: bool) -> list[tuple[float, Any]]:
    """Return the time of each kernel, or operation on the CPU, in microseconds, with its entry; the costliest first."""
    kind = DeviceType.CUDA if on_device else DeviceType.CPU
    costs = [
        (entry.self_device_time_total if on_device else entry.self_cpu_time_total, entry)
        for entry in averages
        if entry.device_type == kind and not _is_annotation(entry)
    ]
    return sorted(costs, key=lambda pair: -pair[0])


def _parts(entries: Sequence[Any], steps: int) -> str:
    """Return the host's time in each part of a step. A device may still be at work when a part is over."""
    of_part = {entry.key: entry for entry in entries if entry.device_type == DeviceType.CPU and entry.key in STEP_PARTS}
    rows = [("part of a step", "host ms")]
    rows += [(part, _ms(of_part[part].cpu_time_total / steps)) for part in STEP_PARTS if part in of_part]
    return aligned(rows, right=(1,))


def _kernels(entries: Sequence[Any], steps: int, *, on_device: bool, most: int) -> str:
    costs = kernel_costs(entries, on_device=on_device)
    total = sum(cost for cost, _ in costs) or 1.0
    rows = [("ms a step", "share", "calls a step", "µs a call", "kernel" if on_device else "operation on the CPU")]
    for cost, entry in costs[:most]:
        name = entry.key if len(entry.key) <= _NAME else f"{entry.key[:_NAME]}…"
        share, calls = f"{100 * cost / total:.1f} %", f"{entry.count / steps:.1f}"
        rows.append((_ms(cost / steps), share, calls, f"{cost / max(1, entry.count):.1f}", name))
    others = sum(cost for cost, _ in costs[most:])
    if others:
        rows.append((_ms(others / steps), f"{100 * others / total:.1f} %", "", "", f"{len(costs) - most} others"))
    return aligned(rows, right=(0, 1, 2, 3))


def _is_annotation(entry: Any) -> bool:
    """Whether an entry is a range that was named, not work: its own time is that of the host between operations."""
    return bool(entry.is_user_annotation) or entry.key in STEP_PARTS or entry.key.startswith(_ANNOTATION)


def _ms(microseconds: float) -> str:
    return f"{microseconds / 1000:.3f}"
