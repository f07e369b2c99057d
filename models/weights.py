"""Weights in files and into models: safetensors with the config as JSON in their header. Nothing is ever unpickled."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from models.atomic_write import replacing

State = Mapping[str, Tensor]
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file: its shape is known, and its numbers are read when they are asked for."""

    path: Path
    name: str
    shape: torch.Size
    file: Any

    def read(self) -> Tensor:
        """The tensor, anew with each call, in memory of its own; `ValueError` if the file has been damaged since."""
        try:
            return self.file.get_tensor(self.name)
        except SafetensorError as error:
            raise _damaged(self.path, error) from error


Weights = Mapping[str, Tensor | Stored]
"""Tensors by name, in memory or still in a file."""


def read(value: Tensor | Stored) -> Tensor:
    """The tensor, wherever it is."""
    return value.read() if isinstance(value, Stored) else value


def save_weights(path: str | Path, state: State, config: Mapping[str, Any]) -> None:
    """Write tensors and their config (anything that JSON holds) to one file, which appears whole or not at all.

    Raises:
        OSError: it could not be written; what was there before is untouched.
    """
    tensors = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in state.items()}
    write_safetensors(path, tensors, {"config": json.dumps(config, sort_keys=True)})


def write_safetensors(path: str | Path, state: State, metadata: Mapping[str, str]) -> None:
    """Write contiguous tensors that share no memory, and metadata, to one file, as `save_weights` does."""
    try:
        with replacing(Path(path)) as partial:
            save_file(dict(state), partial, metadata=dict(metadata))
            partial.chmod(0o666 & ~_umask())  # safetensors makes its files unreadable for the group
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else 0, f"could not be written ({error})", str(path)) from error


def _umask() -> int:
    """Reading it is setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def load_weights(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of a file by `save_weights`.

    Raises:
        ValueError: the file is truncated, foreign or without a config.
        FileNotFoundError: there is none.
    """
    config, stored = open_weights(path)
    return config, {name: value.read() for name, value in stored.items()}


def open_weights(path: str | Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    """`load_weights`, with the tensors not read yet."""
    metadata, stored = open_safetensors(path)
    if "config" not in metadata:
        raise ValueError(f"{path} has no config in its header: it was not written by this program")
    try:
        config = json.loads(metadata["config"])
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: the config in its header is no JSON ({error})") from error
    return config, stored


def open_safetensors(path: str | Path) -> tuple[dict[str, str], dict[str, Stored]]:
    """Metadata and tensors of any safetensors file; `ValueError` with the file's name where it is none."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give the file in it")
    try:
        # not mapped into memory, where what was read would stay next to what it was read for
        file = safe_open(path, framework="pt", backend="pread")
    except SafetensorError as error:
        raise _damaged(path, error) from error
    shapes = {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return file.metadata() or {}, {name: Stored(path, name, shape, file) for name, shape in shapes.items()}


def _damaged(path: Path, error: SafetensorError) -> ValueError:
    return ValueError(f"{path} is no whole safetensors file ({error}): fetch or export it again")


def hash_state(config: Mapping[str, Any], state: State) -> str:
    """SHA-256 in hex of a config and its tensors: names, types, shapes and bits, in whatever order they come."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def filled(build: Callable[[], Model], state: Weights, where: str, name_of: Callable[[str], str] = str) -> Model:
    """What `build` makes, with its weights from `state`, where its tensor `name` is called `name_of(name)`.

    What lies in files is read tensor by tensor, once all are known to fit: there is never a second copy of the whole.

    Raises:
        ValueError: a tensor is missing, unknown or of another shape; begins with `where` and names it.
    """
    with torch.device("meta"):
        model = build()
    shapes = {name_of(name): value.shape for name, value in model.state_dict().items()}
    problems = {
        "missing": sorted(shapes.keys() - state.keys()),
        "unknown": sorted(state.keys() - shapes.keys()),
        "of another shape": [
            f"{name} {tuple(state[name].shape)}, not {tuple(shapes[name])}"
            for name in sorted(shapes.keys() & state.keys())
            if state[name].shape != shapes[name]
        ],
    }
    found = [f"{problem}: {listed(names)}" for problem, names in problems.items() if names]
    if found:
        raise ValueError(f"{where} do not fit the config; {'; '.join(found)}")
    for name, value in model.to_empty(device="cpu").state_dict().items():
        value.copy_(read(state[name_of(name)]))
    return model


def listed(names: list[str], most: int = 5) -> str:
    """The first few names, and how many there are where that is not all."""
    return ", ".join(names[:most]) + (f" … ({len(names)} in all)" if len(names) > most else "")
