"""Sets as earlier versions wrote them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.lib import recfunctions

from trainer.data.index_row import INDEX_ROWS, OLDER_INDEX_ROWS
from trainer.data.shard_set import ShardSet


def as_version_2(folder: Path) -> ShardSet:
    """Turn a set into one of an older version, whose metadata has no checksum."""
    index = np.load(folder / "index.npy")
    np.save(folder / "index.npy", without_checksums(index))
    description = json.loads((folder / "set.json").read_text())
    del description["checksum"]
    (folder / "set.json").write_text(json.dumps(description | {"version": 2}))
    return ShardSet(folder)


def without_checksums(rows: np.ndarray) -> np.ndarray:
    older = OLDER_INDEX_ROWS[INDEX_ROWS.index(rows.dtype)]
    return recfunctions.require_fields(rows, older)
