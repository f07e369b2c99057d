"""What `nvidia-smi` says of a node's GPUs, strictly read: what it does not say is passed over, and told.

A count of uncorrectable ECC errors alone is no fault of a GPU that remaps rows: the driver has replaced the row. A
remapping that waits for a reset or has failed is one, and so is a recovery that the driver asks for after an Xid.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from typing import NamedTuple
from xml.etree import ElementTree

from trainer.file_names import printable

_PATIENCE = 20.0  # seconds; a driver that hangs gives no answer at all
_IN_USE = 0.1  # fraction of a GPU's memory that may be in use before the job begins: the driver takes up to 2 %
_LOST = ("Unable to determine the device handle", "GPU is lost", "fallen off the bus", "Unknown Error")
_PENDING = (
    *("retired_pages/pending_retirement", "retired_pages/pending_blacklist"),
    "remapped_rows/remapped_row_pending",
)
_UNTOLD = ("", "N/A", "[N/A]", "Insufficient Permissions", "Requested functionality has been deprecated")
_RESET = "have it reset (`nvidia-smi --gpu-reset`) or the node rebooted"


class GpuFindings(NamedTuple):
    """What is wrong with a node's GPUs, and what could not be found out; one line each."""

    faults: list[str]
    passed_over: list[str]


def look_at_gpus(asked: int) -> GpuFindings:
    """Ask nvidia-smi once; `asked`: how many GPUs this node has to have."""
    try:
        done = subprocess.run(["nvidia-smi", "-q", "-x"], capture_output=True, text=True, timeout=_PATIENCE)
    except FileNotFoundError:
        return GpuFindings([], ["there is no nvidia-smi"])
    except subprocess.TimeoutExpired:
        return GpuFindings([f"nvidia-smi gives no answer in {_PATIENCE:.0f} s: have the node rebooted"], [])
    except (OSError, UnicodeDecodeError) as error:
        return GpuFindings([], [f"nvidia-smi can't be run: {error}"])
    text = f"{done.stdout}\n{done.stderr}"
    if words := next((words for words in _LOST if words in text), None):
        line = next(line for line in text.splitlines() if words in line)
        return GpuFindings([f"nvidia-smi: {printable(line.strip()[:200])}: {_RESET}"], [])
    try:
        root = ElementTree.fromstring(done.stdout[max(0, done.stdout.find("<nvidia_smi_log")) :])
    except ElementTree.ParseError:
        root = None
    if root is None or root.tag != "nvidia_smi_log":
        return GpuFindings([], [f"nvidia-smi's answer is not understood (status {done.returncode})"])
    return _judged(root.findall("gpu"), asked)


def _judged(gpus: list[ElementTree.Element], asked: int) -> GpuFindings:
    found = GpuFindings([], [])
    if len(gpus) < asked:
        found.faults.append(f"{len(gpus)} of {asked} GPUs are there: {_RESET}")
    for number in _ours(len(gpus), asked):
        gpu = gpus[number]
        found.faults.extend(f"GPU {number} {fault}" for fault in _faults(gpu))
        if _mib(gpu, "fb_memory_usage/used") is None:
            found.passed_over.append(f"GPU {number}: memory in use")
        if _first(gpu, *_PENDING) is None:
            found.passed_over.append(f"GPU {number}: pages and rows that wait for a reset")
    return found


def _ours(there: int, asked: int) -> list[int]:
    """Return which of the GPUs that are shown are this job's: SLURM need not hide the others."""
    # the variable of the job names the GPUs of the batch script's node, on every node
    told = os.environ.get("SLURM_STEP_GPUS") or os.environ.get("SLURM_JOB_GPUS", "")
    ours = [int(word) for word in re.findall(r"\d+", told)]
    return ours if there > asked and ours and max(ours) < there else list(range(there))


def _faults(gpu: ElementTree.Element) -> Iterator[str]:
    used, total = _mib(gpu, "fb_memory_usage/used"), _mib(gpu, "fb_memory_usage/total")
    if used is not None and total and used > _IN_USE * total:
        yield f"has {used:,} of {total:,} MiB in use before the job begins: have the process ended that is left there"
    if any(_text(gpu, path) == "Yes" for path in _PENDING):
        yield f"has damaged memory (ECC) that waits to be replaced: {_RESET}"
    if _text(gpu, "remapped_rows/remapped_row_failure") == "Yes":
        yield "has damaged memory (ECC) that can't be replaced: have the GPU exchanged"
    errors = _first(gpu, "ecc_errors/volatile/double_bit/total", "ecc_errors/volatile/dram_uncorrectable") or ""
    if errors.isdecimal() and int(errors) and _text(gpu, "remapped_rows/remapped_row_pending") is None:
        yield f"has {errors} uncorrectable ECC errors: {_RESET}"
    action = _text(gpu, "gpu_recovery_action")
    if action is not None and action != "None":
        yield f"needs recovery after an error (Xid): {printable(action)}: {_RESET}"


def _first(gpu: ElementTree.Element, *paths: str) -> str | None:
    return next((text for path in paths if (text := _text(gpu, path)) is not None), None)


def _text(gpu: ElementTree.Element, path: str) -> str | None:
    """Return a value; None if nvidia-smi does not tell it."""
    text = (gpu.findtext(path) or "").strip()
    return None if text in _UNTOLD else text


def _mib(gpu: ElementTree.Element, path: str) -> int | None:
    match = re.fullmatch(r"(\d+) MiB", _text(gpu, path) or "")
    return int(match[1]) if match else None
