"""The rows of a set's index: their types, and what must be true of a row and its sample."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from isal.isal_zlib import crc32  # the same sum as zlib's, several times as fast
from numpy.typing import NDArray

# Offsets are bytes from the start of the shard. x0's offset and length leave out the .npy header.
_OLDER_ROW = np.dtype(
    [
        ("shard", "<u4"),
        ("frames", "<u4"),
        ("x0_offset", "<u8"),
        ("x0_length", "<u4"),
        ("x0_crc32", "<u4"),
        ("json_offset", "<u8"),
        ("json_length", "<u4"),
    ]
)
# The checksum of the values of x0 followed by the metadata, so that another sample's metadata does not pass either.
INDEX_ROW = np.dtype([*_OLDER_ROW.descr, ("json_crc32", "<u4")])
_AUDIO_COLUMNS = [("flac_offset", "<u8"), ("flac_length", "<u4"), ("flac_crc32", "<u4")]
_TEXT_COLUMNS = [("text_offset", "<u8"), ("text_length", "<u4"), ("text_crc32", "<u4"), ("text_tokens", "<u4")]
_MORE_COLUMNS: tuple[list[tuple[str, str]], ...] = (
    [],
    _AUDIO_COLUMNS,
    _TEXT_COLUMNS,
    [*_AUDIO_COLUMNS, *_TEXT_COLUMNS],
)
INDEX_ROWS = tuple(np.dtype([*INDEX_ROW.descr, *more]) for more in _MORE_COLUMNS)
"""Row types without audio and text, with audio, with text, and with both; all rows of a set have the same type."""
OLDER_INDEX_ROWS = tuple(np.dtype([*_OLDER_ROW.descr, *more]) for more in _MORE_COLUMNS)
"""The same types in sets of version 2, whose metadata has no checksum."""
INDEX_ROW_WITH_AUDIO = INDEX_ROWS[1]
LONGEST_INDEX_ROW = max(row.itemsize for row in INDEX_ROWS)
"""Bytes of a row with audio and text."""
LONGEST_MEMBER = 2**32 - 1
"""The maximum number of bytes in a member, by the columns of lengths."""
LONGEST_METADATA = 16 << 20
"""The maximum number of bytes in a sample's `KEY.json`."""


def metadata_checksum(row: np.void, about: bytes) -> int:
    """Return the CRC-32 of a sample's latents and its `KEY.json`, which is empty if the sample has none."""
    return crc32(about, int(row["x0_crc32"]))


def checked_metadata(row: np.void, content: bytes) -> dict[str, Any]:
    """Return a sample's metadata from its `KEY.json`, which is empty if the sample has none.

    Raises:
        ValueError: this is not what was indexed, or not a JSON object; the message is a predicate.
    """
    if "json_crc32" in (row.dtype.names or ()) and row["json_crc32"] != metadata_checksum(row, content):
        raise ValueError("does not have the checksum that is in the index")
    return parse_metadata(content) if content else {}


def parse_metadata(content: bytes) -> dict[str, Any]:
    """Return the content of a sample's `KEY.json`.

    Raises:
        ValueError: this is not a JSON object; the message is a predicate.
    """
    try:
        metadata = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON: {error}") from error
    if not isinstance(metadata, dict):
        kinds = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}
        kind = kinds.get(type(metadata), "a number")
        raise ValueError(f'is {kind}, but metadata must be an object, such as {{"caption": "rain"}}')
    return metadata


def well_formed(rows: NDArray[np.void] | Mapping[str, NDArray[Any]], channels: int) -> NDArray[np.bool]:
    """Whether the latents' length of each row fits its number of frames."""
    return rows["x0_length"] == _bytes_each(channels) * rows["frames"]


def text_fits(rows: NDArray[np.void], text: Mapping[str, Any]) -> NDArray[np.bool]:
    """Whether each row's text length fits its number of tokens, which is at most the maximum per caption."""
    whole = rows["text_length"] == _bytes_each(text["width"]) * rows["text_tokens"]
    return whole & (rows["text_tokens"] <= text["tokens"])


def _bytes_each(values: int) -> np.uint64:
    """Return the bytes of so many float16 values, or a number that is more than any row's length."""
    return np.uint64(min(2 * values, LONGEST_MEMBER + 1))
