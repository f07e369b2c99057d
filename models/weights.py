"""Save weights to files and load them into models: safetensors with the config as JSON in the header, never pickles."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from models.atomic_write import replacing
from models.disk_errors import patiently
from models.documents import damaged, opened, parse_json

_MEND = "download or export it again"

_UNREADABLE = (SafetensorError, RuntimeError, OverflowError, TypeError, KeyError)
"""Errors of the library and of torch about a header whose types or shapes do not go with the data."""
_SYSTEM_ERROR = r"os error (\d+)"  # how safetensors gives the number of a system error
State = Mapping[str, Tensor]
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file: its shape is known, and `read` loads its numbers."""

    path: Path
    name: str
    shape: torch.Size
    file: Any

    def read(self) -> Tensor:
        """Read the tensor into newly allocated memory; raise `ValueError` if the file was damaged after opening."""
        return patiently(self._read)

    def _read(self) -> Tensor:
        try:
            return self.file.get_tensor(self.name)
        except _UNREADABLE as error:
            raise _read_error(self.path, error) from error


Weights = Mapping[str, Tensor | Stored]
"""Maps names to tensors, which are in memory or still in a file."""


def read(value: Tensor | Stored) -> Tensor:
    """Return the tensor, and read it first if it is still in a file."""
    return value.read() if isinstance(value, Stored) else value


def save_weights(path: str | Path, state: State, config: Mapping[str, Any]) -> None:
    """Write tensors and their config (any JSON object) to one file, which appears whole or not at all.

    Raises:
        OSError: the file could not be written; an older file at `path` is unchanged.
    """
    tensors = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in state.items()}
    write_safetensors(path, tensors, {"config": json.dumps(config, sort_keys=True)})


def write_safetensors(path: str | Path, state: State, metadata: Mapping[str, str]) -> None:
    """Write metadata and tensors, which are contiguous and share no memory, to one file, as `save_weights` does."""
    try:
        with replacing(Path(path)) as partial:
            save_file(dict(state), partial, metadata=dict(metadata))
            partial.chmod(0o666 & ~_umask())  # safetensors creates files that the group can't read
    except SafetensorError as error:
        number = re.search(_SYSTEM_ERROR, str(error))
        raise OSError(int(number[1]) if number else 0, f"could not be written ({error})", str(path)) from error


def _umask() -> int:
    """Return the process's umask; Python can only read it by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def load_weights(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the config and the tensors of a file that `save_weights` wrote.

    Raises:
        ValueError: the file is truncated, is not a safetensors file, or has no config.
        FileNotFoundError: the file does not exist.
    """
    config, stored = open_weights(path)
    return config, {name: value.read() for name, value in stored.items()}


def open_weights(path: str | Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    """Read a file's config as `load_weights` does, but leave its tensors in the file until they are read."""
    metadata, stored = open_safetensors(path)
    if "config" not in metadata:
        raise ValueError(f"{path} has no config in its header: it was not written by this program")
    return parse_json(metadata["config"], dict[str, Any], f"{path}: the config in its header", mend=_MEND), stored


def open_safetensors(path: str | Path) -> tuple[dict[str, str], dict[str, Stored]]:
    """Open any safetensors file; return its metadata and its unread tensors.

    Raises:
        ValueError: the path is a folder or a pipe, or the file is not a safetensors file or is damaged.
        FileNotFoundError: the file does not exist.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give a safetensors file in it")
    return patiently(lambda: _open_safetensors(path))


def _open_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Stored]]:
    try:
        with opened(path):  # a pipe would hold up the library, and its errors do not name a file that can't be opened
            pass
    except ValueError as error:
        raise damaged(path, error, _MEND) from None
    try:
        # Read with pread, because the pages of a memory map would stay in memory next to the tensors' copies.
        file = safe_open(path, framework="pt", backend="pread")
        shapes = {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except _UNREADABLE as error:
        raise _read_error(path, error) from error
    return file.metadata() or {}, {name: Stored(path, name, shape, file) for name, shape in shapes.items()}


def _read_error(path: Path, error: Exception) -> ValueError | OSError:
    """Return the error of a damaged file, or of a disk that failed while the file was read."""
    if number := re.search(_SYSTEM_ERROR, str(error)):
        return OSError(int(number[1]), os.strerror(int(number[1])), str(path))
    return ValueError(f"{path} is not a complete safetensors file ({error}): {_MEND}")


def hash_state(config: Mapping[str, Any], state: State) -> str:
    """Return the SHA-256 in hex of a config and of all tensors' names, types, shapes and bits, in any order."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Fill(Protocol):
    """Builds a model and gives it its weights: `filled`, or `outlined`, which only checks that they fit."""

    def __call__(
        self, build: Callable[[], Model], state: Weights, where: str, name_of: Callable[[str], str] = str
    ) -> Model:
        """Build the model; raises as `filled` does."""
        ...


def filled(build: Callable[[], Model], state: Weights, where: str, name_of: Callable[[str], str] = str) -> Model:
    """Build a model on the CPU and load its weights from `state`, which calls the tensor `name` `name_of(name)`.

    Tensors in files are read one by one after all names and shapes are checked, so memory never holds a second copy.

    Raises:
        ValueError: a tensor is missing, unknown or of another shape. The message begins with `where` and names it.
    """
    model = outlined(build, state, where, name_of)
    for name, value in model.to_empty(device="cpu").state_dict().items():
        value.copy_(read(state[name_of(name)]))
    return model


def outlined(build: Callable[[], Model], state: Weights, where: str, name_of: Callable[[str], str] = str) -> Model:
    """Build a model on the meta device, without memory, and check that the weights in `state` fit it.

    Building ends as soon as the model has more weights than `state`, so that a config can ask for any number of blocks.

    Raises:
        ValueError: as for `filled`.
    """
    try:
        with torch.device("meta"), _at_most(2 * len(state) + 100):
            model = build()
    except (RuntimeError, OverflowError) as error:  # sizes that no tensor can have
        raise ValueError(f"{where} do not fit the config; {str(error).splitlines()[0]}") from None
    require_fit(model.state_dict(), state, where, name_of)
    return model


def require_fit(wanted: State, state: Weights, where: str, name_of: Callable[[str], str] = str) -> None:
    """Raise ValueError unless `state` has the names and shapes of `wanted`, see `filled`."""
    shapes = {name_of(name): value.shape for name, value in wanted.items()}
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


@contextmanager
def _at_most(count: int) -> Iterator[None]:
    """Raise RuntimeError if modules that are built in the block register more than `count` parameters."""
    left = iter(range(count))

    def registered(module: nn.Module, name: str, value: nn.Parameter | None) -> None:
        if next(left, None) is None:
            raise RuntimeError("the config has more weights than the file")

    hook = register_module_parameter_registration_hook(registered)
    try:
        yield
    finally:
        hook.remove()


def listed(names: list[str], most: int = 5) -> str:
    """Join the first `most` names, and add the total number if there are more."""
    return ", ".join(names[:most]) + (f" … ({len(names)} in all)" if len(names) > most else "")
