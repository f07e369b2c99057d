"""Asks a running training for a trace of its steps: the request that `spresso profile` leaves in a stage's directory.

Rank 0 looks for the request with each line of its log. It notes in the request how many steps it has traced, and
removes the request once the trace and its table are written. Importing this module needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from models.documents import Moment, Natural, write_json
from trainer.run_documents import read_optional

_FILE = "request.json"
_TRACE = ".trace.json.gz"
_TABLE = ".kernels.txt"


@dataclass(frozen=True)
class TraceRequest:
    """The content of a request."""

    steps: Annotated[int, msgspec.Meta(ge=1, le=20)]
    """Steps to trace: few, because each has thousands of events, and a viewer has to hold them all."""
    asked: Moment
    """When the trace was asked for, which also tells one request from another."""
    traced: Natural | None = None
    """Steps traced so far; None until rank 0 has seen the request."""


def trace_folder(stage: Path) -> Path:
    """Return the folder of the traces in a stage's directory."""
    return stage / "profile"


def trace_path(stage: Path, name: str) -> Path:
    """Return the path of a trace: `name` is that of a checkpoint at the samples seen before the first traced step."""
    return trace_folder(stage) / f"{name}{_TRACE}"


def table_beside(trace: Path) -> Path:
    """Return the path of the table of the costliest kernels of a trace."""
    return trace.with_name(trace.name.removesuffix(_TRACE) + _TABLE)


def traces(stage: Path) -> list[Path]:
    """Return the traces of a stage, by samples seen."""
    return sorted(trace_folder(stage).glob(f"[!.]*{_TRACE}"))


def read_request(stage: Path) -> TraceRequest | None:
    """Return the request for a trace that waits in a stage's directory; None if there is none.

    Raises:
        ValueError: the request is damaged.
        OSError: it can't be read.
    """
    return read_optional(_path(stage), TraceRequest, mend="remove it, and ask again")


def write_request(stage: Path, request: TraceRequest) -> None:
    """Leave a request in a stage's directory, or replace the one that is there."""
    write_json(_path(stage), request, durable=False)


def remove_request(stage: Path) -> None:
    """Remove the request in a stage's directory, if there is one."""
    _path(stage).unlink(missing_ok=True)


def _path(stage: Path) -> Path:
    return trace_folder(stage) / _FILE
