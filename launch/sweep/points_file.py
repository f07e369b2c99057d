"""Reads the YAML file of `--points`: grids, lists that move together, and random search.

    grid: {autoencode.lr: [1e-4, 3e-4]}
    paired: {latent_encoder.pooling: [9, 18], autoencode.crop_frames: [63, 126]}      # or a list of such tables
    random:
      number: 20
      seed: 0
      ranges:
        finetune.lr: {log_uniform: [1e-5, 1e-3]}
        finetune.decay: {uniform: [0, 0.5]}
        lora.rank: {integers: [4, 64]}
        lora.variant: {choices: [plain, dora]}

Values stay as they were typed, as on the command line: YAML is not to make a number or a truth of them.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from launch.sweep.random_draws import Draw, draws
from models.documents import damaged, read_bytes
from models.yaml_document import read_yaml

_MEND = "write it as docs/training.md shows"
_MOST = 10_000
_KINDS = ("uniform", "log_uniform", "integers", "choices")
Settings = dict[str, str]
"""The settings of a point as they were typed, by their dotted keys."""


@dataclass
class PointsFile:
    """The content of a file: each group is a list of alternatives, and the points are all their combinations."""

    groups: list[list[Settings]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def read_points(path: Path) -> PointsFile:
    """Read a file; what is wrong with its parts is in `problems`, so that all of it is told at once.

    Raises:
        ValueError: the file is not YAML, or is no table.
        OSError: the file can't be read.
    """
    read_yaml(path, mend=_MEND)  # bounds its size and its aliases
    try:
        root = yaml.compose(read_bytes(path, mend=_MEND).decode("utf-8-sig"), Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise damaged(path, " ".join(str(error).split()), _MEND) from None
    found = PointsFile()
    for name, node in _items(root):
        if name not in (read := {"grid": _grid, "paired": _paired, "random": _random}):
            near = difflib.get_close_matches(name, list(read), n=1, cutoff=0.0)[0]
            found.problems.append(f"{path}: unknown part {name}: the nearest known one is {near}")
            continue
        try:
            found.groups += read[name](node)
        except ValueError as error:
            found.problems += [f"{path}: {name}: {line}" for line in str(error).splitlines()]
    return found


def _grid(node: yaml.Node) -> Iterator[list[Settings]]:
    for key, values in _lists(node).items():
        yield [{key: value} for value in values]


def _paired(node: yaml.Node) -> Iterator[list[Settings]]:
    for table in node.value if isinstance(node, yaml.SequenceNode) else [node]:
        lists = _lists(table)
        if len(set(map(len, lists.values()))) > 1:
            told = ", ".join(f"{key} has {len(values)}" for key, values in lists.items())
            raise ValueError(f"paired lists must have the same length, but {told}: make them equally long")
        yield [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]


def _random(node: yaml.Node) -> Iterator[list[Settings]]:
    parts = dict(_items(node))
    if unknown := parts.keys() - {"number", "seed", "ranges"}:
        raise ValueError(f"unknown part {sorted(unknown)[0]}: write number, seed and ranges")
    number, seed = _number(parts, "number", 1), _number(parts, "seed", 0, default=0)
    ranges = {key: _draw(key, value) for key, value in _items(parts["ranges"])} if "ranges" in parts else {}
    found = [f"{key} {problem}" for key, draw in ranges.items() if (problem := draw.problem())]
    if not ranges:
        found.append("ranges is missing: give one such as `ranges: {autoencode.lr: {log_uniform: [1e-5, 1e-3]}}`")
    if found:
        raise ValueError("\n".join(found))
    yield list(draws(ranges, number=number, seed=seed))


def _number(parts: dict[str, yaml.Node], name: str, least: int, *, default: int | None = None) -> int:
    node = parts.get(name)
    if node is None and default is not None:
        return default
    text = node.value if isinstance(node, yaml.ScalarNode) else ""
    if not text.isdecimal() or not least <= int(text[:20]) <= (_MOST if name == "number" else 2**63):
        raise ValueError(f"{name} must be a whole number from {least}{f' to {_MOST}' if name == 'number' else ''}")
    return int(text)


def _draw(key: str, node: yaml.Node) -> Draw:
    [(kind, options), *others] = _items(node) or [("", node)]
    if others or kind not in _KINDS or not isinstance(options, yaml.SequenceNode):
        raise ValueError(f"{key}: write one of {', '.join(f'{{{known}: […]}}' for known in _KINDS)}")
    return Draw(kind, tuple(_typed(option) for option in options.value))


def _lists(node: yaml.Node) -> dict[str, list[str]]:
    """Return the values of a table of lists, by their keys; a single value is a list of one."""
    found = {}
    for key, value in _items(node):
        values = value.value if isinstance(value, yaml.SequenceNode) else [value]
        if not values:
            raise ValueError(f"{key} has no values: give some, or remove it")
        found[key] = [_typed(item) for item in values]
    if not found:
        raise ValueError("it has no settings: give some, or remove it")
    return found


def _items(node: yaml.Node) -> list[tuple[str, yaml.Node]]:
    """Return the keys and values of a table; raises ValueError if the node is none or has a key twice."""
    if not isinstance(node, yaml.MappingNode):
        raise ValueError("it must be a table such as `{autoencode.lr: [1e-4, 3e-4]}`")
    names = [str(name.value) for name, _ in node.value]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{twice[0]} is there twice: give all its values in one list")
    return [(str(name.value), value) for name, value in node.value]


def _typed(node: yaml.Node) -> str:
    """Return a value as it would be typed behind `key=` on the command line."""
    if isinstance(node, yaml.ScalarNode):
        return node.value if node.style is None else json.dumps(node.value, ensure_ascii=False)
    return yaml.serialize(_flowing(node), Dumper=yaml.SafeDumper, allow_unicode=True, width=2**31).strip()


def _flowing(node: yaml.Node) -> yaml.Node:
    """Return a node of YAML written on one line: with brackets instead of indentation."""
    if isinstance(node, yaml.CollectionNode):
        node.flow_style, node.anchor = True, None
        for item in node.value:
            for inner in item if isinstance(item, tuple) else (item,):
                _flowing(inner)
    return node
