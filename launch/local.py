"""A trained stage on this machine: in this process, or as several ranks, each its own process."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

import torch.multiprocessing as multiprocessing

from launch import owner
from launch.signals import INTERRUPTED, MISTAKE, SIGNALS, STOPPED, StopFlag
from launch.slurm.attempt import TOKEN
from trainer.recipes.schema import Config
from trainer.run_directory import stage_folder

_GRACE = 5.0  # seconds for the other ranks to leave by themselves once one has left


def train_here(config: Config, stage: str) -> str:
    """Train a stage to its end; returns "done", or "stopped" where a signal asked to leave, be it in the last step.

    Where a launcher (torchrun, srun) has set RANK and WORLD_SIZE, this process is one of its ranks; otherwise
    `parallel.processes` ranks are started here.
    """
    folder = stage_folder(config, stage)
    launched = "RANK" in os.environ  # by something that starts many of us: whether to is for it to know
    if not launched:
        owner.take(folder, owner.by_hand())
    try:
        if not launched and config.parallel.processes > 1:
            return _train_ranks(config, stage, config.parallel.processes)
        with StopFlag() as stop:
            # here, under the flag: importing torch takes seconds, in which a signal may come
            from trainer.loop import train

            outcome = train(config, stage, stop=stop, permitted=_permitted(config, stage))
            return "stopped" if stop() else outcome
    finally:
        if not launched:
            owner.release(folder, os.environ.pop(TOKEN))


def _permitted(config: Config, stage: str) -> Callable[[], None]:
    """Raises once another start of the run has taken over."""
    folder = stage_folder(config, stage)
    return (lambda: owner.require(folder)) if TOKEN in os.environ else (lambda: None)


def _train_ranks(config: Config, stage: str, ranks: int) -> str:
    context = multiprocessing.start_processes(
        _rank, args=(config, stage, ranks, _free_port()), nprocs=ranks, join=False, start_method="spawn"
    )
    assert context is not None

    asked = False

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        for process in context.processes:
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, number)

    before = {number: signal.signal(number, forward) for number in SIGNALS}
    try:
        while not context.join(grace_period=_GRACE):
            pass
    except multiprocessing.ProcessExitedException as error:
        if error.exit_code == STOPPED or (asked and -error.exit_code in SIGNALS):  # before it could listen
            _join_all(context)
            return "stopped"
        if error.exit_code not in (MISTAKE, INTERRUPTED):  # of which the rank itself has said why
            how = f"was killed by {error.signal_name}" if error.signal_name else f"ended with status {error.exit_code}"
            log = stage_folder(config, stage) / "logs" / f"rank_{error.error_index}.log"
            print(f"spresso: rank {error.error_index} {how}, and the others with it; see {log}", file=sys.stderr)
        raise SystemExit(max(1, error.exit_code)) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return "stopped" if asked else "done"


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
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
    try:
        with StopFlag() as stop:
            import torch.distributed as dist

            from trainer.loop import train

            outcome = train(config, stage, stop=stop, permitted=_permitted(config, stage))
    except KeyboardInterrupt:
        _leave(INTERRUPTED)
    except (ValueError, OSError) as error:
        print(f"spresso: rank {rank}: {error}", file=sys.stderr)
        _leave(MISTAKE)
    # Every rank leaves alike: a status of its own tells the parent that all was saved.
    dist.destroy_process_group()
    _leave(STOPPED if outcome == "stopped" else 0)


def _leave(status: int) -> NoReturn:
    """At once: the threads of a process group don't survive the interpreter's own end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
