"""Names of points: what differs, readable, unique, and safe as the name of a folder on every file system."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping

_LONGEST = 100  # characters, so that paths with it stay short enough for all file systems and for `sbatch`
_UNSAFE = re.compile(r"[^A-Za-z0-9.=+_-]+")
_HASH = 8


def name_of(settings: Mapping[str, str], taken: Collection[str] = ()) -> str:
    """Return the name of a point: `autoencode.lr=1e-4,lora.rank=8`.

    A name that leaves something out, or that would be one of those `taken`, ends with a hash of the settings. Names
    that differ in case alone count as the same, as some file systems do not tell them apart.

    Args:
        settings: the point's own settings as they were typed, by their keys.
        taken: names of other points.
    """
    words = [f"{key}={_plain(value)}" for key, value in sorted(settings.items())]
    exact = ",".join(words)
    name = ",".join(_UNSAFE.sub("_", word).replace("=_", "=").strip("_") for word in words)
    if name == exact and len(name) <= _LONGEST and name.casefold() not in {other.casefold() for other in taken}:
        return name
    digest = hashlib.sha256("\0".join(f"{key}={settings[key]}" for key in sorted(settings)).encode(errors="replace"))
    return f"{name[: _LONGEST - _HASH - 1].rstrip('._-,=')}-{digest.hexdigest()[:_HASH]}"


def _plain(value: str) -> str:
    """Return a value without the quotes around it, if nothing is quoted inside."""
    inner = value[1:-1]
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    return inner if quoted and value[0] not in inner and "\\" not in inner else value
