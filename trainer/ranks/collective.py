"""What ranks do together, so that all of them get on or all of them fail. Without a process group there is one rank.

`group` is the ranks' process group: by default the one that training uses, so that only the training's own thread may
take part; a thread beside it brings a group of its own.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch.distributed as dist

DISK_FULL = "no space left on the disk"
_SHOWN = 5

Result = TypeVar("Result")


def rank() -> int:
    """This one's number."""
    return dist.get_rank() if dist.is_initialized() else 0


def own_group() -> dist.ProcessGroup | None:
    """A group of all ranks for one thread of each, in host memory. All ranks."""
    return dist.new_group(backend="gloo") if dist.is_initialized() else None


def gather(value: Result, group: dist.ProcessGroup | None = None) -> list[Result]:
    """Every rank's value, on every rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def on_rank_0(action: Callable[[], Result], group: dist.ProcessGroup | None = None) -> Result:
    """What `action` gives on rank 0, on every rank. Raises as `together` does."""
    return cast(Result, together(lambda: action() if rank() == 0 else None, group)[0])


def together(action: Callable[[], Result], group: dist.ProcessGroup | None = None) -> list[Result]:
    """Does `action` on every rank and gives everyone's results.

    Raises:
        OSError: on every rank, if it failed on any, whatever the cause: nobody may wait for a rank that gave up.
    """
    result, reason = None, None
    try:
        result = action()
    except Exception as error:
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        reason = DISK_FULL if full else f"rank {rank()}: {error!r}"
    outcomes = gather((result, reason), group)
    failures = [reason for _, reason in outcomes if reason]
    if DISK_FULL in failures:
        raise OSError(errno.ENOSPC, DISK_FULL)
    if failures:
        raise OSError(shortened(failures))
    return [cast(Result, result) for result, _ in outcomes]


def require_alike(what: str, value: object) -> None:
    """Raise ValueError on every rank where not all have the same."""
    everyones = gather(str(value))
    if len(set(everyones)) > 1:
        told = [f"rank {rank}: {value[:12]}" for rank, value in enumerate(everyones)]
        raise ValueError(f"{what} is not the same on every rank: {shortened(told)}")


def shortened(problems: list[str]) -> str:
    """The first few of them in one line, and how many more there are."""
    more = len(problems) - _SHOWN
    return "; ".join(problems[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")
