"""Rank processes for tests, with a launcher's environment, forked from a server that has already imported torch."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["tests.trainer.preloaded"])


def free_port() -> int:
    """Return a port that no process listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(function: Callable[..., None], world_size: int, *arguments: Any) -> list[multiprocessing.process.BaseProcess]:
    """Start `function(rank, *arguments)` in `world_size` processes."""
    port = free_port()
    processes = [
        _SERVER.Process(target=_as_rank, args=(function, rank, world_size, port, arguments))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return processes


def run(function: Callable[..., None], world_size: int, *arguments: Any, seconds: float = 300) -> list[int | None]:
    """Run the ranks to their end and return the exit statuses; kill those that take longer than `seconds`."""
    processes = start(function, world_size, *arguments)
    for process in processes:
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def _as_rank(function: Callable[..., None], rank: int, world_size: int, port: int, arguments: tuple[Any, ...]) -> None:
    if world_size > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    status = 1
    try:
        import tests.trainer.preloaded  # noqa: F401  # loaded already, unless product code has started the server

        function(rank, *arguments)
        status = 0
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)  # the process group's threads crash if the interpreter shuts down normally
