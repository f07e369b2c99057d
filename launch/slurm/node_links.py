"""How long two nodes take to exchange a tensor, for each neighbour in a ring: a slow cable or card shows there.

A sum over all nodes takes as long on a healthy node as on the slow one, which it waits for.
"""

from __future__ import annotations

import time
from typing import Any

_NUMBERS = 2**20  # of 4 bytes, in each direction
_REPEATS = 4


def neighbour(rank: int, count: int, turn: int) -> int | None:
    """Return the rank with which a rank exchanges a tensor in a turn; None if it waits.

    Even ranks exchange with the next one in turn 0, odd ranks in turn 1, and the last one of an odd number with the
    first one in turn 2. After `turns(count)`, each of three or more ranks has had two neighbours.
    """
    if turn == 2:
        return {0: count - 1, count - 1: 0}.get(rank)
    other = rank + 1 if rank % 2 == turn else rank - 1
    if count % 2:
        return other if 0 <= other < count else None
    return other % count


def turns(count: int) -> int:
    """Return the number of turns in which all neighbours exchange a tensor."""
    return 1 if count == 2 else 2 + count % 2


def measure_links(torch: Any, store: Any, device: str, name: str) -> dict[str, float]:
    """Return the seconds of an exchange with each neighbour, by the neighbour's name, the best of several.

    All ranks of the default process group call this function.

    Args:
        torch: the package, which is imported late on a node that may lack it.
        store: the group's store.
        device: device of the tensors: `cuda:0`, or `cpu`.
        name: this node's name.
    """
    dist = torch.distributed
    rank, count = dist.get_rank(), dist.get_world_size()
    store.set(f"name/{rank}", name)
    ours, theirs = torch.ones(_NUMBERS, device=device), torch.empty(_NUMBERS, device=device)
    found = {}
    for turn in range(turns(count)):
        dist.barrier()
        if (other := neighbour(rank, count, turn)) is not None:
            seconds = [_exchange(torch, ours, theirs, other) for _ in range(_REPEATS)]
            found[store.get(f"name/{other}").decode()] = min(seconds)
    return found


def _exchange(torch: Any, ours: Any, theirs: Any, other: int) -> float:
    dist = torch.distributed
    begun = time.perf_counter()
    sent = dist.P2POp(dist.isend, ours, other)
    received = dist.P2POp(dist.irecv, theirs, other)
    for work in dist.batch_isend_irecv([sent, received]):
        work.wait()
    if ours.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begun
