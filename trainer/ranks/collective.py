"""Collectives on plain values, in which all ranks succeed or all fail. Without a process group there is one rank.

Values travel as JSON (`trainer.ranks.messages` names their types): torch's own collectives for objects unpickle what
they receive, which could be a stranger's.

`group` is the process group of the collective. The default group belongs to the training thread; any other thread must
pass its own group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist

from models.disk_errors import first_lasting, room_words, with_number
from models.readable import describe_os_error
from trainer.ranks import messages

_SHOWN = 5

Result = TypeVar("Result")


class _Failure(NamedTuple):
    """An error of one rank, in a form that other ranks can be sent."""

    number: int | None
    """The errno of an OSError; None for any other error."""
    reason: str


def rank() -> int:
    """Return this process's rank."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def device(group: dist.ProcessGroup | None = None) -> torch.device:
    """Return the device whose tensors a group exchanges."""
    on_gpu = dist.is_initialized() and "nccl" in dist.get_backend(group)
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def own_group() -> dist.ProcessGroup | None:
    """Create a gloo group of all ranks, for use by one other thread of each rank. All ranks."""
    return dist.new_group(backend="gloo") if dist.is_initialized() else None


def gather(value: Result, group: dist.ProcessGroup | None = None) -> list[Result]:
    """Return every rank's value, on every rank. All ranks. A named tuple arrives as a plain one."""
    if not dist.is_initialized():
        return [value]
    message, place = _message(value), device(group)
    length = torch.tensor([len(message)], device=place)
    lengths = [torch.empty_like(length) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, length, group=group)
    sizes = torch.cat(lengths).tolist()
    padded = torch.zeros(max(sizes), dtype=torch.uint8)
    padded[: len(message)] = message
    received = [torch.empty(len(padded), dtype=torch.uint8, device=place) for _ in sizes]
    dist.all_gather(received, padded.to(place), group=group)
    return [_value(values[:size]) for values, size in zip(received, sizes, strict=True)]


def collect(
    value: Result, group: dist.ProcessGroup | None = None, *, senders: Sequence[int], receiver: int
) -> list[Result]:
    """Return the values of a few ranks on one rank, in the order of `senders`; [] on all others.

    `gather` takes as many bytes from each rank as the largest value has, and gives all values to all ranks.
    """
    if rank() != receiver:
        if rank() in senders:
            message, place = _message(value), device(group)
            dist.send(torch.tensor([len(message)], device=place), receiver, group)
            dist.send(message.to(place), receiver, group)
        return []
    return [value if sender == receiver else _received(sender, group) for sender in senders]


def _received(sender: int, group: dist.ProcessGroup | None) -> Any:
    """Return the value that another rank sends in `collect`."""
    length = torch.empty(1, dtype=torch.int64, device=device(group))
    dist.recv(length, sender, group)
    message = torch.empty(int(length), dtype=torch.uint8, device=device(group))
    dist.recv(message, sender, group)
    return _value(message)


def _message(value: Any) -> torch.Tensor:
    """Return a value as the bytes that ranks exchange, (n,), uint8, in host memory."""
    return torch.frombuffer(bytearray(messages.encode(value)), dtype=torch.uint8)


def _value(message: torch.Tensor) -> Any:
    return messages.decode(message.cpu().numpy().tobytes())


def on_rank_0(action: Callable[[], Result], group: dist.ProcessGroup | None = None) -> Result:
    """Call `action` on rank 0, and return its result on every rank. All ranks. Raises as `together` does.

    No rank returns before every rank has the result. Each rank exchanges the result's bytes, however many ranks there
    are.
    """
    outcome = _outcome(action) if rank() == 0 else (None, None)
    if dist.is_initialized():
        outcome = _of_rank_0(outcome, group)
        received = torch.zeros(1, device=device(group))
        dist.all_reduce(received, group=group)
        received.item()  # waits for a GPU, which all other ranks wait for
    result, failure = outcome
    _raise_first({0: _Failure(*failure)} if failure else {})
    return cast(Result, result)


def _of_rank_0(value: Any, group: dist.ProcessGroup | None) -> Any:
    """Return rank 0's value on every rank. All ranks."""
    message, place = _message(value) if rank() == 0 else torch.empty(0, dtype=torch.uint8), device(group)
    length = torch.tensor([len(message)], device=place)
    dist.broadcast(length, 0, group)
    message = message.to(place) if rank() == 0 else torch.empty(int(length), dtype=torch.uint8, device=place)
    dist.broadcast(message, 0, group)
    return _value(message)


def together(action: Callable[[], Result], group: dist.ProcessGroup | None = None) -> list[Result]:
    """Call `action` on every rank, and return every rank's result. All ranks. The results should be small.

    Raises:
        OSError: on every rank, if `action` failed on any rank for whatever reason, so that no rank waits for a failed
            one. Its `errno` is that of the failed rank's OSError, by which a full disk is told from a passing failure.
    """
    outcomes = gather(_outcome(action), group)
    _raise_first({number: _Failure(*failure) for number, (_, failure) in enumerate(outcomes) if failure})
    return [cast(Result, result) for result, _ in outcomes]


def _outcome(action: Callable[[], Result]) -> tuple[Result | None, _Failure | None]:
    """Call `action`, and return its result and None, or None and its failure."""
    try:
        return action(), None
    except OSError as error:
        return None, _Failure(error.errno, describe_os_error(error))
    except Exception as error:
        return None, _Failure(None, repr(error))


def _raise_first(failures: Mapping[int, _Failure]) -> None:
    """Raise the OSError of failed ranks, if there are any."""
    if not failures:
        return
    number = first_lasting([failure.number for failure in failures.values()])
    if full := room_words(number):
        raise OSError(number, full)
    raise with_number(number, shortened([f"rank {rank}: {failure.reason}" for rank, failure in failures.items()]))


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
