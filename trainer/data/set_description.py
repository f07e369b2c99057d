"""Reads `set.json`, which describes a set of shards."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from models.documents import LARGEST_LIST, DamagedDocument, Natural, Positive, damaged, fits, read_json
from trainer.data.shards import MAKE_AGAIN, READABLE_VERSIONS, SetInfo


class _Text(TypedDict):
    encoder: str
    tokens: Positive
    width: Positive


class _Info(TypedDict):
    """The fields of `SetInfo`."""

    ae_identity: str
    ae_options: dict[str, Any]
    sample_rate: Positive
    hop: Positive
    latent_channels: Positive
    clip_seconds: float
    prepared: NotRequired[dict[str, Any]]
    text: NotRequired[_Text | None]


class _Shard(TypedDict):
    name: str
    bytes: Natural


class _Description(_Info):
    fingerprint: str
    checksum: NotRequired[Natural]
    samples: Natural
    total_frames: Natural
    shortest_frames: Natural
    longest_frames: Natural
    shards: list[_Shard]


def read_description(folder: Path, location: str) -> dict[str, Any]:
    """Read the fields of a set's `set.json`, but for its version; errors name the set by its `location`.

    Raises:
        ValueError: the file is damaged, or of another version.
        FileNotFoundError: there is no such file.
    """
    where = f"{location}/set.json"
    description = read_json(folder / "set.json", dict[str, Any], mend=MAKE_AGAIN, most=LARGEST_LIST, finite=True)
    if description.pop("version", None) not in READABLE_VERSIONS:
        raise DamagedDocument(f"{where} was written by another version of spresso: {MAKE_AGAIN}")
    fits(description, _Description, where, mend=MAKE_AGAIN)
    if unknown := description.keys() - _Description.__annotations__.keys():
        raise damaged(where, f"it has an unknown field `{min(unknown)}`", MAKE_AGAIN)
    if strays := [shard["name"] for shard in description["shards"] if Path(shard["name"]).name != shard["name"]]:
        raise DamagedDocument(f"{where} names a shard outside of the set's folder: {strays[0]}")
    if others := [shard["name"] for shard in description["shards"] if not shard["name"].endswith(".tar")]:
        raise DamagedDocument(f"{where} names a shard that is no .tar: {others[0]}")
    return description


def info_of(folder: Path) -> SetInfo | None:
    """Return the `SetInfo` in the folder's `set.json`, or None if that file is missing, damaged or incomplete."""
    try:
        description = read_json(folder / "set.json", _Info, mend=MAKE_AGAIN, most=LARGEST_LIST, finite=True)
    except (OSError, ValueError):
        return None
    known = {field.name for field in fields(SetInfo)}
    return SetInfo(**{name: value for name, value in description.items() if name in known})  # type: ignore[arg-type]
