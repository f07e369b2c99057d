"""Reads the header of a `.npy` file that holds a float16 matrix."""

from __future__ import annotations

import re

LONGEST_NPY_HEADER = 4096
"""Bytes; numpy's own header of a matrix has 128."""

_MAGIC = b"\x93NUMPY\x01\x00"
_LENGTH = slice(8, 10)
# The header is a dictionary as Python writes it. numpy evaluates it, with errors of many kinds if it is none.
_ENTRY = re.compile(
    r"""[ ]* (?P<quote>["']) (?P<key>descr|fortran_order|shape) (?P=quote) [ ]* : [ ]*
        (?P<value> "[^"]*" | '[^']*' | True | False | \( [0-9, ]* \) ) [ ]* (?:,|\Z) [ ]*""",
    re.VERBOSE,
)
_SHAPE = re.compile(r"\( *(0|[1-9][0-9]*) *, *(0|[1-9][0-9]*) *,? *\)")
_FLOAT16 = re.compile(r"""["'](?:[<=|]?f2|[<=]?e|float16)["']""")


def float16_shape(beginning: bytes) -> tuple[tuple[int, int], int]:
    """Return the shape of a float16 matrix in C order, and the length of its header in bytes.

    Args:
        beginning: the first `LONGEST_NPY_HEADER` bytes of the file, or the whole file if it is shorter.

    Raises:
        ValueError: this is no such matrix; the message is a predicate.
    """
    if not beginning.startswith(_MAGIC):
        raise ValueError("is not a .npy array of format version 1.0")
    end = _LENGTH.stop + int.from_bytes(beginning[_LENGTH], "little")
    if end > len(beginning):
        raise ValueError(f"is not a .npy array: its header claims {end} bytes")
    text = beginning[_LENGTH.stop : end].decode("latin1").strip(" \n")
    entries = _entries(text)
    shape = _SHAPE.fullmatch(entries.get("shape", ""))
    if not shape or not _FLOAT16.fullmatch(entries["descr"]) or entries["fortran_order"] != "False":
        raise ValueError(f"is not a float16 matrix in C order: its header is {text[:200]!a}")
    return (int(shape[1]), int(shape[2])), end


def _entries(text: str) -> dict[str, str]:
    """Return the three entries of a header as they are written, or an empty dict if the header is anything else."""
    entries: dict[str, str] = {}
    at, end = 1, len(text) - 1
    if text[:1] != "{" or text[-1:] != "}":
        return {}
    while at < end:
        entry = _ENTRY.match(text, at, end)
        if entry is None or entry["key"] in entries:
            return {}
        entries[entry["key"]] = entry["value"]
        at = entry.end()
    return entries if len(entries) == 3 else {}
