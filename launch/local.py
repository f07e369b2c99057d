"""Trains a stage on this machine: in this process, or in one process per rank."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import nullcontext
from types import FrameType
from typing import NoReturn

import torch.multiprocessing as multiprocessing

from launch import owner
from launch.error_line import describe_error
from launch.signals import INTERRUPTED, MISTAKE, SIGNALS, STOPPED, StopFlag
from launch.slurm.attempt import TOKEN
from trainer.file_names import printable
from trainer.recipes.schema import Config
from trainer.run_directory import stage_folder

_GRACE = 5.0  # seconds for the other ranks to end by themselves after one has failed


def train_here(config: Config, stage: str) -> str:
    """Train a stage; return "done", or "stopped" if a signal asked the run to stop, even during the last step.

    If a launcher (torchrun, srun) has set RANK and WORLD_SIZE, this process is one of its ranks, and rank 0 owns the
    stage's directory for all of them. Otherwise this function starts `parallel.processes` ranks.

    Raises:
        ValueError: another process or job trains in the stage's directory.
    """
    rank = os.environ.get("RANK")
    with owner.training(stage_folder(config, stage)) if rank in (None, "0") else nullcontext():
        if rank is None and config.parallel.processes > 1:
            return _train_ranks(config, stage, config.parallel.processes)
        with StopFlag() as stop:
            # imported under the flag: importing torch takes seconds, during which a signal may arrive
            from trainer.loop import train

            outcome = train(config, stage, stop=stop, require_ownership=_ownership_check(config, stage))
            return "stopped" if stop() else outcome


def _ownership_check(config: Config, stage: str) -> Callable[[], None]:
    """Return a function that raises Superseded if another start of the run has taken over the directory."""
    folder = stage_folder(config, stage)
    return (lambda: owner.require(folder)) if TOKEN in os.environ else (lambda: None)


def _train_ranks(config: Config, stage: str, ranks: int) -> str:
    context = multiprocessing.start_processes(
        _rank, args=(config, stage, ranks, _free_port()), nprocs=ranks, join=False, start_method="spawn"
    )
    assert context is not None

    stop_requested = False

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal stop_requested
        stop_requested = True
        for process in context.processes:
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, number)

    before = {number: signal.signal(number, forward) for number in SIGNALS}
    try:
        while not context.join(grace_period=_GRACE):
            pass
    except multiprocessing.ProcessExitedException as error:
        # a signal kills a rank that has not set its handler yet
        if error.exit_code == STOPPED or (stop_requested and -error.exit_code in SIGNALS):
            _join_all(context)
            return "stopped"
        if error.exit_code not in (MISTAKE, INTERRUPTED):  # the rank has printed the reason of these itself
            how = f"was killed by {error.signal_name}" if error.signal_name else f"ended with status {error.exit_code}"
            log = stage_folder(config, stage) / "logs" / f"rank_{error.error_index}.log"
            told = f"rank {error.error_index} {how}, so the other ranks were ended; see {log}"
            print(f"spresso: {printable(told)}", file=sys.stderr)
        raise SystemExit(max(1, error.exit_code)) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return "stopped" if stop_requested else "done"


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

            outcome = train(config, stage, stop=stop, require_ownership=_ownership_check(config, stage))
    except KeyboardInterrupt:
        _leave(INTERRUPTED)
    except (ValueError, OSError) as error:
        print(f"spresso: rank {rank}: {describe_error(error)}", file=sys.stderr)
        _leave(MISTAKE)
    # every rank ends with the same status, by which the parent knows that the checkpoint was saved
    dist.destroy_process_group()
    _leave(STOPPED if outcome == "stopped" else 0)


def _leave(status: int) -> NoReturn:
    """End the process at once: the threads of a process group do not survive the interpreter's shutdown."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
