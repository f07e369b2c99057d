"""Ranks for a benchmark: processes that find each other as under a launcher."""

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
    """`benchmarks/PROGRAM arguments…` as so many ranks, a thread each; what they say goes to `log`."""
    command = [sys.executable, str(ROOT / "benchmarks" / program), *map(str, arguments)]
    port, ranks = free_port(), []
    for rank in range(world_size):
        with log.open("a") as file:
            environment = os.environ | _environment(rank, world_size, port)
            ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=file, text=True))
    return ranks


def run(program: str, world_size: int, *arguments: object, log: Path, seconds: float = 300) -> dict[str, Any]:
    """The same to its end: what the first rank handed to `give`."""
    ranks = start(program, world_size, *arguments, log=log)
    try:
        outputs = [rank.communicate(timeout=seconds)[0] for rank in ranks]
    finally:
        stop(ranks)
    given = [line for line in outputs[0].splitlines() if line.startswith(RESULT)]
    if not given:
        raise SystemExit(f"{program} {' '.join(map(str, arguments))} failed, see {log}:\n{log.read_text()[-3000:]}")
    return json.loads(given[-1].removeprefix(RESULT))


def stop(ranks: Sequence[subprocess.Popen[str]]) -> None:
    """End those that have not ended."""
    for rank in ranks:
        rank.kill()
        rank.wait()


def give(result: dict[str, Any]) -> None:
    """For `run`, from a rank."""
    print("\n" + RESULT + json.dumps(result), flush=True)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)},
        **{"LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        **{"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)},
        **{"PYTHONWARNINGS": "ignore", "TQDM_DISABLE": "1"},
    }


def conditions(*packages: str) -> dict[str, Any]:
    """When, where and with what a benchmark ran."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def told(conditions: dict[str, Any]) -> str:
    """The same in a line."""
    versions = ", ".join(f"{name} {version}" for name, version in conditions["versions"].items())
    return f"{conditions['date']}, {conditions['machine']}, {versions}."


def say(text: str) -> None:
    """Progress, beside the tables."""
    print(text, file=sys.stderr, flush=True)
