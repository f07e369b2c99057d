"""Collectives on Python objects, in which all ranks succeed or all fail. Without a process group there is one rank.

`group` is the process group of the collective. The default group belongs to the training thread; any other thread must
pass its own group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch.distributed as dist

from models.disk_errors import first_lasting, room_words, with_number
from models.readable import describe_os_error

_SHOWN = 5

Result = TypeVar("Result")


def rank() -> int:
    """Return this process's rank."""
    return dist.get_rank() if dist.is_initialized() else 0


def own_group() -> dist.ProcessGroup | None:
    """Create a gloo group of all ranks, for use by one other thread of each rank. All ranks."""
    return dist.new_group(backend="gloo") if dist.is_initialized() else None


def gather(value: Result, group: dist.ProcessGroup | None = None) -> list[Result]:
    """Return every rank's value, on every rank. All ranks."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def on_rank_0(action: Callable[[], Result], group: dist.ProcessGroup | None = None) -> Result:
    """Call `action` on rank 0, and return its result on every rank. All ranks. Raises as `together` does."""
    return cast(Result, together(lambda: action() if rank() == 0 else None, group)[0])


def together(action: Callable[[], Result], group: dist.ProcessGroup | None = None) -> list[Result]:
    """Call `action` on every rank, and return every rank's result. All ranks.

    Raises:
        OSError: on every rank, if `action` failed on any rank for whatever reason, so that no rank waits for a failed
            one. Its `errno` is that of the failed rank's OSError, by which a full disk is told from a passing failure.
    """
    result, failure = None, None
    try:
        result = action()
    except OSError as error:
        failure = (error.errno, describe_os_error(error))
    except Exception as error:
        failure = (None, repr(error))
    outcomes = gather((result, failure), group)
    failures = {number: failure for number, (_, failure) in enumerate(outcomes) if failure}
    if failures:
        number = first_lasting([number for number, _ in failures.values()])
        if full := room_words(number):
            raise OSError(number, full)
        raise with_number(number, shortened([f"rank {rank}: {reason}" for rank, (_, reason) in failures.items()]))
    return [cast(Result, result) for result, _ in outcomes]


def require_alike(what: str, value: object) -> None:
    """Raise ValueError on every rank unless all ranks pass the same value. All ranks. `what` names the value."""
    of_ranks = gather(str(value))
    if len(set(of_ranks)) > 1:
        values = [f"rank {rank}: {value[:12]}" for rank, value in enumerate(of_ranks)]
        raise ValueError(f"{what} is not the same on every rank: {shortened(values)}")


def shortened(problems: list[str]) -> str:
    """Join the first few problems into one line, with the number of further ones."""
    more = len(problems) - _SHOWN
    return "; ".join(problems[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")
