"""A trained stage on this machine: in this process, or as several ranks, each its own process."""

from __future__ import annotations

import os
import signal
import socket
import sys
from types import FrameType

from launch.preemption import SIGNALS, STOPPED, StopFlag
from trainer.config import Config


def train_here(config: Config, stage: str) -> str:
    """Train a stage to its end; returns "done" or "stopped".

    Where a launcher (torchrun, srun) has set RANK and WORLD_SIZE, this process is one of its ranks; otherwise
    `parallel.processes` ranks are started here.
    """
    if "RANK" in os.environ or config.parallel.processes == 1:
        from trainer.loop import train

        return train(config, stage, stop=StopFlag())
    return _train_ranks(config, stage, config.parallel.processes)


def _train_ranks(config: Config, stage: str, ranks: int) -> str:
    import torch.multiprocessing as multiprocessing

    context = multiprocessing.start_processes(
        _rank, args=(config, stage, ranks, _free_port()), nprocs=ranks, join=False, start_method="spawn"
    )
    assert context is not None

    def forward(number: int, frame: FrameType | None) -> None:
        for process in context.processes:
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, number)

    before = {number: signal.signal(number, forward) for number in SIGNALS}
    try:
        while not context.join():
            pass
    except multiprocessing.ProcessExitedException as error:
        if error.exit_code == STOPPED:
            _join_all(context)
            return "stopped"
        raise SystemExit(error.exit_code) from None  # the rank itself has said why
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return "done"


def _join_all(context: object) -> None:
    for process in context.processes:  # type: ignore[attr-defined]
        process.join()


def _rank(rank: int, config: Config, stage: str, ranks: int, port: int) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    from trainer.loop import train

    try:
        outcome = train(config, stage, stop=StopFlag())
    except (ValueError, OSError) as error:
        print(f"spresso: rank {rank}: {error}", file=sys.stderr)
        sys.exit(2)
    # every rank leaves alike: a status of its own tells the parent that all was saved
    if outcome == "stopped":
        os._exit(STOPPED)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
