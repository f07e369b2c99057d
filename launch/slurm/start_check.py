"""The check of all nodes at the start of a job: each measures itself, and is compared with the others."""

from __future__ import annotations

import os
import statistics
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from launch.slurm import scheduler
from launch.slurm.job_script import flags
from launch.slurm.node_health import LAST, MARK, Report
from launch.slurm.slurm_task import rendezvous
from models.documents import parse_json
from trainer.file_names import printable
from trainer.recipes.cluster import ClusterConfig

_PATIENCE = 150.0  # seconds, within which torch is imported on all nodes
_PROBLEM = 20  # lines of what srun says that are kept
_CLOCK = 10.0  # seconds between two nodes' clocks: notes and locks are compared by time
_SLOW = {"GPU": 2.0, "CPU": 5.0}
"""Times the median of all devices from which a device is too slow. GPUs of one kind differ by some percent, and one
that is throttled is several times slower; a node's CPUs may be shared with other jobs."""
_SLOW_LINK = {"GPU": 5.0, "CPU": 20.0}
"""Times the median of the nodes' faster links from which a link is too slow. Nodes on different switches are farther
apart, and links are shared with other jobs. A CPU that others use delays an exchange as well."""
_NETWORK = "see NCCL_SOCKET_IFNAME in docs/cluster.md"


@dataclass
class Findings:
    """What the check of the nodes has found."""

    faults: dict[str, list[str]] = field(default_factory=dict)
    """What is wrong, and what to do, by node."""
    remarks: list[str] = field(default_factory=list)
    """What concerns no node in particular, or was passed over."""


def check_nodes(cluster: ClusterConfig, port: int) -> Findings:
    """Check all nodes of this job, from its batch script; `port`: a free one of the first node. Never raises."""
    try:
        nodes = scheduler.hostnames(os.environ["SLURM_JOB_NODELIST"])
        reports, problem = _reports(cluster, port, len(nodes))
    except (OSError, ValueError) as error:
        return Findings(remarks=[f"the nodes were not checked: {error}"])
    if len(reports) < len(nodes) and 2 * len(reports) <= len(nodes):
        return Findings(remarks=[f"the nodes were not checked: {problem or 'most gave no report'}"])
    return compare(nodes, reports)


def compare(nodes: Sequence[str], reports: Mapping[str, tuple[Report, float]]) -> Findings:
    """Judge the nodes' reports.

    Args:
        nodes: names of all nodes.
        reports: report of each node that gave one, and how many seconds its clock is ahead of the first node's.
    """
    found = Findings()

    def blame(node: str, fault: str) -> None:
        found.faults.setdefault(node, []).append(fault)

    for node in nodes:
        if node not in reports:
            blame(node, "gave no report, as the others did: look at SLURM's log of the node")
    for node, (report, ahead) in reports.items():
        for fault in report["faults"]:
            blame(node, fault)
        if abs(ahead) > _CLOCK:
            way = "ahead" if ahead > 0 else "behind"
            blame(node, f"has a clock that is {abs(ahead):.0f} s {way}: have it set (NTP)")
        if not report["reached"]:
            blame(
                node,
                f"does not reach {nodes[0]}: {printable(report['network'])}: see cluster.environment, *_SOCKET_IFNAME",
            )
        found.remarks += [f"{node}: not told by nvidia-smi: {what}" for what in report["passed_over"]]
    for node, device, times in _slow(reports):
        blame(node, f"{device} takes {times:.1f} times as long for a matrix product as the median: have it looked at")
    for node, times in _cut_off(reports):
        blame(node, f"takes {times:.1f} times as long as the median to exchange data: have its network card looked at")
    networks = [report["network"] for report, _ in reports.values() if report["reached"] and report["network"]]
    if networks and all(report["reached"] for report, _ in reports.values()):
        found.remarks.append(f"the nodes can't sum a tensor together: {printable(networks[0])}: {_NETWORK}")
    return found


def _slow(reports: Mapping[str, tuple[Report, float]]) -> list[tuple[str, str, float]]:
    """Return the node and name of each device that is too slow, and its time as a multiple of the median."""
    found = []
    for kind, factor in _SLOW.items():
        seconds = [
            (node, device, taken)
            for node, (report, _) in reports.items()
            for device, taken in report["products"].items()
            if device.startswith(kind)
        ]
        median = statistics.median(taken for _, _, taken in seconds) if len(seconds) > 2 else float("inf")
        found += [(node, device, taken / median) for node, device, taken in seconds if taken > factor * median]
    return found


def _cut_off(reports: Mapping[str, tuple[Report, float]]) -> list[tuple[str, float]]:
    """Return each node whose links are all too slow, and its faster one as a multiple of the median over nodes.

    A slow link has two ends. The one at fault is the one whose other link is slow, too.
    """
    fastest = {node: min(report["links"].values()) for node, (report, _) in reports.items() if report["links"]}
    if len(fastest) < 3:
        return []
    median = statistics.median(fastest.values())
    on_gpus = any(device.startswith("GPU") for report, _ in reports.values() for device in report["products"])
    factor = _SLOW_LINK["GPU" if on_gpus else "CPU"]
    return [(node, taken / median) for node, taken in fastest.items() if taken > factor * median]


def _reports(cluster: ClusterConfig, port: int, count: int) -> tuple[dict[str, tuple[Report, float]], str]:
    """Run the check on all nodes; return the reports, and what srun says if it fails."""
    # srun mixes the lines of tasks that are unbuffered; others it keeps whole up to `node_health.LINE`
    options = {"nodes": count, "ntasks": count, "ntasks-per-node": 1, "kill-on-bad-exit": 0}
    check = f"exec {cluster.ranks_python} -m launch.slurm.node_health {cluster.gpus_per_node} {port}"
    command = ["srun", *flags(options | cluster.srun), "bash", "-c", check]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "errors": "replace"}
    environment = os.environ | rendezvous(str(port))
    with ThreadPoolExecutor(1) as pool, subprocess.Popen(command, env=environment, **pipes) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        # read meanwhile: a full pipe would hold up srun, and with it the reports
        problem = pool.submit(deque[str], process.stderr, _PROBLEM)
        limit = threading.Timer(_PATIENCE, process.kill)
        limit.start()
        try:
            found, said = _read(process.stdout), problem.result()  # before the pipes are closed
        except BaseException:
            process.kill()
            raise
        finally:
            limit.cancel()
    return found, " ".join("".join(said).split())[-400:]


def _read(lines: Iterable[str]) -> dict[str, tuple[Report, float]]:
    """Return the reports among lines, with how many seconds each node's clock is ahead. Raises ValueError."""
    parts: dict[str, str] = {}
    found: dict[str, tuple[Report, float]] = {}
    for line in lines:
        if MARK not in line:
            continue
        rank, last, part = line.partition(MARK)[2].rstrip("\r\n").split(" ", 2)
        parts[rank] = parts.get(rank, "") + part
        if last == LAST:
            report = parse_json(parts[rank], Report, "a node's report", mend="")
            found[report["node"]] = report, report["clock"] - time.time()
    return found
