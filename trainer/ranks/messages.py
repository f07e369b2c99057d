"""Values that ranks send to each other, as JSON.

torch's collectives for objects send pickles, and whoever reaches a rank's port could have that rank run code. JSON
holds nothing but plain values. A tuple, a path and a table are marked as such, so that they arrive as what they were.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_TUPLE, _PATH, _TABLE = "tuple", "path", "table"


def encode(value: Any) -> bytes:
    """Return a value as JSON.

    Args:
        value: None, a truth, a number, text, a path, or lists, tuples and tables with text as keys of these. A named
            tuple arrives as a plain one.

    Raises:
        TypeError: the value is of another type.
    """
    return json.dumps(_plain(value)).encode()


def decode(content: bytes) -> Any:
    """Return the value that `encode` was given; raises ValueError if the content is no such value."""
    try:
        return _restored(json.loads(content))
    except RecursionError as error:
        raise ValueError("a rank sent a message that is nested too deeply") from error


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, tuple):
        return {_TUPLE: [_plain(item) for item in value]}
    if isinstance(value, Path):
        return {_PATH: str(value)}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {_TABLE: {key: _plain(item) for key, item in value.items()}}
    raise TypeError(f"ranks can't send each other a {type(value).__name__}: {value!r:.100}")


def _restored(plain: Any) -> Any:
    if isinstance(plain, list):
        return [_restored(item) for item in plain]
    if not isinstance(plain, dict):
        return plain
    match [*plain.items()]:
        case [(str(kind), list(items))] if kind == _TUPLE:
            return tuple(_restored(item) for item in items)
        case [(str(kind), str(path))] if kind == _PATH:
            return Path(path)
        case [(str(kind), dict(items))] if kind == _TABLE:
            return {key: _restored(item) for key, item in items.items()}
    raise ValueError("a rank sent a message that is none of this version of spresso")
