"""Keeps text as it was typed: a value that the schema calls text must not become a number, a truth or a time."""

from __future__ import annotations

import dataclasses
import functools
import re
import typing
from types import NoneType
from typing import Any

import yaml

from trainer.recipes.cluster import ClusterConfig
from trainer.recipes.schema import Config, recipe_schema

_STR, _NULL, _BOOL, _MERGE = (f"tag:yaml.org,2002:{name}" for name in ("str", "null", "bool", "merge"))
_WHOLE_NUMBER = re.compile(r"0|-?[1-9][0-9]*")


def is_text(key: str) -> bool:
    """Whether the value of a dotted key of a recipe is text, or None."""
    return kind_without_none(_hint_at(key)) is str


def may_be_none(key: str) -> bool:
    """Whether the value of a dotted key of a recipe may be None."""
    return NoneType in typing.get_args(_hint_at(key))


def quote_text(text: str, *, key: str = "") -> str:
    """Return YAML in which every plain value that the schema calls text is quoted.

    Args:
        text: YAML.
        key: dotted key of the recipe under which the YAML belongs; empty for a whole recipe.

    Raises:
        yaml.YAMLError: the text is not YAML.
    """
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    if node is None or not _quote(node, _hint_at(key)):
        return text
    return yaml.serialize(node, Dumper=yaml.SafeDumper, allow_unicode=True, width=2**31)


def _quote(node: yaml.Node, hint: Any) -> bool:
    """Quote the text in a node whose type is `hint`; return whether any was quoted."""
    kind = kind_without_none(hint)
    if isinstance(node, yaml.ScalarNode):
        typed = kind is str or dataclasses.is_dataclass(kind)  # text in place of a table is the name of a file
        plain_word = node.tag == _STR and node.value[:1].isalpha()  # no reader of YAML makes anything else of it
        if node.style is not None or node.tag == _NULL or plain_word or not (typed or _altered(node, kind)):
            return False
        node.tag, node.style = _STR, "'"
        return True
    if isinstance(node, yaml.SequenceNode):
        inner = typing.get_args(kind)[0] if typing.get_origin(kind) is list else Any
        done = [_quote(item, inner) for item in node.value]
        return any(done)
    assert isinstance(node, yaml.MappingNode)
    done = []
    for name, value in node.value:
        if name.tag == _MERGE:
            done.append(_quote(value, list[hint] if isinstance(value, yaml.SequenceNode) else hint))  # type: ignore[valid-type]
            continue
        done += [_quote(name, str), _quote(value, hint_below(kind, str(name.value)))]
    return any(done)


def _altered(node: yaml.ScalarNode, kind: Any) -> bool:
    """Whether a value of any type would not be printed as it was typed: 12:30, 007, 1e3."""
    return kind is Any and node.tag != _BOOL and not _WHOLE_NUMBER.fullmatch(node.value)


def _hint_at(key: str) -> Any:
    hint: Any = recipe_schema()
    for name in filter(None, key.split(".")):
        hint = hint_below(kind_without_none(hint), name)
    return hint


def kind_without_none(hint: Any) -> Any:
    """Return a type without its `| None`."""
    kinds = [part for part in typing.get_args(hint) if part is not NoneType]
    return kinds[0] if NoneType in typing.get_args(hint) and len(kinds) == 1 else hint


def hint_below(kind: Any, name: str) -> Any:
    """Return the type of the value `name` in a table of this type; None if it has no such value."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _hints(kind).get(name)
    return typing.get_args(kind)[1] if typing.get_origin(kind) is dict else Any if kind is Any else None


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    if kind is ClusterConfig:
        hints["stages"] = dict[str, ClusterConfig]  # a stage's own values for the same settings
    if issubclass(kind, Config):
        hints["model"] = str  # the name of a file
    return hints
