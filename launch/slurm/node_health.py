"""Measures the health of a node: `python -m launch.slurm.node_health GPUS PORT`, a task on each node of a job.

It prints a `Report` as JSON, in `lines`. `launch.slurm.start_check` starts it, and judges the reports of all nodes.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypedDict

from launch.slurm.gpu_report import look_at_gpus
from launch.slurm.node_links import measure_links
from launch.slurm.variables import RUN
from models.documents import Moment, to_json
from trainer.formatting import size

MARK = "spresso-health "
"""What each line of a report begins with: a job's setup and modules print lines of their own."""
LAST, _MORE = "last", "more"
LINE = 700
"""Letters of a report in a line: srun passes on 1024 bytes at once, and mixes longer lines with those of others."""
_TEMP = 256 * 2**20  # bytes that must be free where temporary files go: loaders and compilers fail without them
_SIDE, _REPEATS = 4096, 8  # a product of matrices on a GPU takes some milliseconds
_SIDE_CPU = 512
_NUMBERS = 2**20  # of the sum over nodes
_PATIENCE = 30.0  # seconds for a node to find the others


class Report(TypedDict):
    """What a node says of itself."""

    node: str
    clock: Moment
    """The node's time, taken as the report is printed."""
    faults: list[str]
    passed_over: list[str]
    products: dict[str, float]
    """Seconds of a matrix product, by device: `GPU 0`, or `CPU`."""
    network: str
    """Why the nodes could not sum a tensor together; empty if they could."""
    reached: bool
    """Whether this node reached the first one."""
    links: dict[str, float]
    """Seconds of an exchange with each neighbour, by its name, see `node_links`; empty if they were not measured."""


def faults_here(gpus: int) -> tuple[list[str], list[str]]:
    """Return what is wrong with this node by itself, and what could not be found out."""
    found = look_at_gpus(gpus) if gpus else ([], [])
    faults, passed_over = list(found[0]), list(found[1])
    folder = tempfile.gettempdir()
    if (free := shutil.disk_usage(folder).free) < _TEMP:
        faults.append(f"{folder} has {size(free)} free: have it emptied, or set TMPDIR in cluster.environment")
    if not Path(os.environ[RUN]).is_dir():
        faults.append(f"{os.environ[RUN]} is not seen: have the shared disk mounted")
    return faults, passed_over


def report(gpus: int, port: int) -> Report:
    """Examine this node, which takes seconds."""
    faults, passed_over = faults_here(gpus)
    products: dict[str, float] = {}
    links: dict[str, float] = {}
    network, reached = "", True
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    try:
        import torch

        products = _products(torch, gpus)
        reached, network = _sum_of_nodes(torch, port, node, links)
    except Exception as error:
        faults.append(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}: look at its log")
    found = {"faults": faults, "passed_over": passed_over, "products": products, "links": links}
    return Report(node=node, clock=time.time(), network=network, reached=reached, **found)  # type: ignore[typeddict-item]


def _products(torch: Any, gpus: int) -> dict[str, float]:
    """Return the seconds of a product of two matrices on each device, the best of several."""
    if not (gpus and torch.cuda.is_available()):
        a = torch.ones(_SIDE_CPU, _SIDE_CPU)
        return {"CPU": _best(lambda: a @ a, lambda: None)}
    found = {}
    for number in range(torch.cuda.device_count()):
        a = torch.ones(_SIDE, _SIDE, device=f"cuda:{number}", dtype=torch.bfloat16)
        found[f"GPU {number}"] = _best(lambda: a @ a, lambda: torch.cuda.synchronize(number))  # noqa: B023
        if float((a[:1] @ a[:, :1]).item()) != _SIDE:
            raise ArithmeticError(f"GPU {number} computes a wrong product")
    return found


def _best(work: Callable[[], object], finish: Callable[[], object]) -> float:
    seconds = []
    for _ in range(_REPEATS):
        begun = time.perf_counter()
        work()
        finish()
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


def _sum_of_nodes(torch: Any, port: int, node: str, links: dict[str, float]) -> tuple[bool, str]:
    """Sum a tensor over all nodes, then measure this node's links, which are added to `links`.

    Returns whether the first node was reached, and why the sum failed.
    """
    import torch.distributed as dist

    from trainer.ranks.gloo import prepare_gloo

    rank, count = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    if count == 1:
        return True, ""
    prepare_gloo(count)
    on_gpu, patience = torch.cuda.is_available(), timedelta(seconds=_PATIENCE)
    try:
        first = os.environ["MASTER_ADDR"]
        store = dist.TCPStore(first, port, count, rank == 0, timeout=patience, wait_for_workers=False)
    except Exception as error:
        return False, str(error).splitlines()[0]
    try:
        backend = "nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=patience)
        device = "cuda:0" if on_gpu else "cpu"
        total = torch.ones(_NUMBERS, device=device)
        dist.all_reduce(total)
        problem = "" if float(total[0]) == count == float(total[-1]) else "the sum is wrong"
        links |= measure_links(torch, store, device, node)
        dist.barrier()
        return True, problem
    except Exception as error:
        return True, str(error).splitlines()[0]


def lines(made: Report, rank: str) -> list[str]:
    """Return the lines of a report: the mark, the task, whether it is the task's last line, and a part of the JSON."""
    text = to_json(made)
    begins = range(0, len(text), LINE)
    return [f"{MARK}{rank} {_MORE if at < begins[-1] else LAST} {text[at : at + LINE]}" for at in begins]


if __name__ == "__main__":
    made = report(int(sys.argv[1]), int(sys.argv[2]))
    made["clock"] = time.time()
    print("\n".join(lines(made, os.environ["SLURM_PROCID"])), flush=True)
    os._exit(0)
