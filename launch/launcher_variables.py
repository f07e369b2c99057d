"""The environment variables by which torchrun, srun or mpirun make a process one of several ranks."""

from __future__ import annotations

import os
from collections.abc import Mapping

_OF_TORCH = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_MARKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_OF_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


def require_whole_launch(environment: Mapping[str, str] = os.environ) -> None:
    """Raise ValueError if a launcher's variables make this process a rank, but do not say how to find the others."""
    missing = [name for name in _OF_TORCH if not environment.get(name)]
    stray = [name for name in _MARKS if name in environment]
    if stray and missing:
        raise ValueError(
            f"{stray[0]}={environment[stray[0]]} is set, as in a rank of torchrun, but {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not: `unset {' '.join(stray)}`, or start the ranks with torchrun "
            f"or parallel.processes=N"
        )
    if stray:
        _require_place(environment)
        return
    for name in _OF_MPI:
        if (count := environment.get(name, "1")) != "1":
            raise ValueError(
                f"{name}={count} is set, as by mpirun, which does not say how ranks of torch find each other: start "
                f"them with torchrun or parallel.processes=N, or `unset {name}`"
            )


def require_no_launcher(environment: Mapping[str, str] = os.environ) -> None:
    """Raise ValueError if a launcher's variables make this process one of several ranks."""
    if stray := [name for name in _MARKS if name in environment]:
        raise ValueError(
            f"{stray[0]}={environment[stray[0]]} is set, as in a rank of torchrun, but a sweep starts the ranks of its "
            f"points itself: run it without a launcher, with parallel.processes=N, or `unset {' '.join(stray)}`"
        )


def _require_place(environment: Mapping[str, str]) -> None:
    """Raise ValueError unless RANK is a number below WORLD_SIZE."""
    rank, count = environment["RANK"], environment["WORLD_SIZE"]
    if not (rank.isdecimal() and count.isdecimal() and int(rank) < int(count)):
        raise ValueError(
            f"RANK={rank} is no rank from 0 to WORLD_SIZE={count} - 1: `unset {' '.join(_MARKS)}`, or start the ranks "
            f"with torchrun"
        )
