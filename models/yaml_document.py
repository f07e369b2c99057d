"""Read YAML: a bounded file whose aliases stand for a bounded number of values."""

from __future__ import annotations

import io
import math
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf

from models.documents import damaged, read_bytes

_LARGEST = 256 << 10  # bytes
_DEEPEST = 32
_MOST_VALUES = 50_000  # with every alias expanded: a short document can stand for billions of values


def read_yaml(path: Path, *, mend: str) -> DictConfig:
    """Read a YAML document that is a mapping.

    Raises:
        DamagedDocument: the path is no regular file, or its content is not YAML, not a mapping, nested too deeply, or
            expands to too many values.
        FileNotFoundError: there is no file.
        OSError: the file can't be read.
    """
    content = read_bytes(path, mend=mend, most=_LARGEST)
    try:
        text = content.decode("utf-8-sig")
        _require_small(text)
        read = OmegaConf.load(io.StringIO(text))
    except RecursionError:
        raise damaged(path, "it is nested too deeply", mend) from None
    except Exception as error:  # the errors of the YAML library share no useful base class
        raise damaged(path, f"it is not valid YAML: {' '.join(str(error).split())}", mend) from None
    if not isinstance(read, DictConfig):
        raise damaged(path, "it is not a mapping such as `name: demo`", mend)
    return read


def _require_small(text: str) -> None:
    """Raise ValueError if a YAML text is nested too deeply, or has too many values once its aliases are expanded."""
    anchored: dict[str, float] = {}
    stack: list[tuple[str | None, float]] = [(None, 0)]  # anchor of each open collection, and its values so far
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        added, anchor = 0.0, getattr(event, "anchor", None)
        if isinstance(event, yaml.CollectionStartEvent):
            stack.append((anchor, 1))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, added = stack.pop()
        elif isinstance(event, yaml.ScalarEvent):
            added = 1
        elif isinstance(event, yaml.AliasEvent):
            added, anchor = anchored.get(event.anchor, math.inf), None
        if anchor is not None and added:
            anchored[anchor] = added
        stack[-1] = (stack[-1][0], stack[-1][1] + added)
        if len(stack) > _DEEPEST:
            raise ValueError(f"it is nested more than {_DEEPEST} deep")
        if stack[-1][1] > _MOST_VALUES:
            raise ValueError(f"it has more than {_MOST_VALUES} values, or one that contains itself")
