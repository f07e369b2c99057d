"""Start a benchmark's ranks: processes whose environment is the one that a launcher would set."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULT = "RESULT "


def start(program: str, world_size: int, *arguments: object, log: Path) -> list[subprocess.Popen[str]]:
    """Start `benchmarks/PROGRAM arguments…` on `world_size` ranks of one thread each; their stderr goes to `log`."""
    command = [sys.executable, str(ROOT / "benchmarks" / program), *map(str, arguments)]
    port, ranks = free_port(), []
    for rank in range(world_size):
        with log.open("a") as file:
            environment = os.environ | _environment(rank, world_size, port)
            ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=file, text=True))
    return ranks


def run(program: str, world_size: int, *arguments: object, log: Path, seconds: float = 300) -> dict[str, Any]:
    """Run a program as `start` does, to its end, and return the result that rank 0 passed to `send_result`."""
    ranks = start(program, world_size, *arguments, log=log)
    try:
        outputs = [rank.communicate(timeout=seconds)[0] for rank in ranks]
    finally:
        stop(ranks)
    results = [line for line in outputs[0].splitlines() if line.startswith(RESULT)]
    if not results:
        raise SystemExit(f"{program} {' '.join(map(str, arguments))} failed, see {log}:\n{log.read_text()[-3000:]}")
    return json.loads(results[-1].removeprefix(RESULT))


def stop(ranks: Sequence[subprocess.Popen[str]]) -> None:
    """Kill the ranks that still run."""
    for rank in ranks:
        rank.kill()
        rank.wait()


def send_result(result: dict[str, Any]) -> None:
    """Print a rank's result in the form that `run` looks for."""
    print("\n" + RESULT + json.dumps(result), flush=True)


def free_port() -> int:
    """Return a port that no process listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)},
        **{"LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        **{"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": path},
        **{"PYTHONWARNINGS": "ignore", "TQDM_DISABLE": "1"},
    }


def conditions(*packages: str) -> dict[str, Any]:
    """Return the date, the machine and the versions of some packages, to be printed with the figures."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def describe(conditions: dict[str, Any]) -> str:
    """Return the conditions as one line."""
    versions = ", ".join(f"{name} {version}" for name, version in conditions["versions"].items())
    return f"{conditions['date']}, {conditions['machine']}, {versions}."


def say(text: str) -> None:
    """Print progress to stderr, so that stdout has only the tables."""
    print(text, file=sys.stderr, flush=True)
