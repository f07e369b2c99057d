"""Released weights in the layout of Hugging Face: a folder, here or in the hub's cache, with a model a subfolder.

Each subfolder holds `config.json` and safetensors, in one file or sharded with an index. Pickles are never opened.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from models.weights import Stored, listed, open_safetensors

_STEMS = ("diffusion_pytorch_model", "model")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def locate(folder: str | Path) -> Path:
    """The folder, or, where there is none and its path is a name of the hub (`owner/model`), the hub's copy of it here.

    Nothing is downloaded: what lies nowhere comes back as it was given.
    """
    path = Path(folder)
    if path.exists() or not is_hub_name(folder):
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(folder), local_files_only=True))
    except LocalEntryNotFoundError:
        return path


def is_hub_name(folder: str | Path) -> bool:
    """Whether it may be a model's name on the hub."""
    return _HUB_NAME.fullmatch(str(folder)) is not None


def missing(folder: str | Path) -> str:
    """What to tell of a folder that `locate` did not find."""
    if not is_hub_name(folder):
        return f"{folder} is no folder"
    return (
        f"{folder} is no folder, and no model in the hub's cache on this machine: give a folder, or fetch it with  "
        f"hf download {folder}  (accept its licence on huggingface.co and run  hf auth login  first, where it asks)"
    )


def find_part(folder: str | Path, part: str) -> Path:
    """The subfolder of a release that holds one of its models.

    Raises:
        ValueError: there is no such release here, or it has no such part.
    """
    path = locate(folder)
    if not path.is_dir():
        raise ValueError(missing(folder))
    if not (path / part / "config.json").is_file():
        raise ValueError(f"{path} has no {part}/config.json: give the whole release, in diffusers' layout")
    return path / part


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises ValueError where the file is missing or holds something else."""
    try:
        values = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: fetch the release again") from None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): fetch the release again") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no settings: fetch the release again")
    return values


def read_config(path: Path, class_name: str, known: Collection[str]) -> dict[str, Any]:
    """The settings in a part's `config.json`, all of which are known.

    Raises:
        ValueError: it is another class's, or one is missing or unknown: it could change what the weights mean.
    """
    values = read_json(path / "config.json")
    if values.get("_class_name", class_name) != class_name:
        raise ValueError(f"{path} holds a {values['_class_name']}, not a {class_name}")
    given = {name: value for name, value in values.items() if not name.startswith("_")}
    problems = [f"{name} is missing" for name in sorted(set(known) - given.keys())]
    problems += [f"{name} is unknown" for name in sorted(given.keys() - set(known))]
    if problems:
        raise ValueError(f"{path / 'config.json'}: {listed(problems)}")
    return given


def require(where: Path, conditions: Mapping[str, bool]) -> None:
    """Raise ValueError with what has to be true and is not."""
    if broken := [what for what, holds in conditions.items() if not holds]:
        raise ValueError(f"{where}: only models can be used in which {'; '.join(broken)}")


def open_part(path: Path) -> dict[str, Stored]:
    """The tensors of a part, not read yet, from one safetensors file or from the shards that an index names.

    Raises:
        ValueError: there is none, or it is damaged or a pickle.
    """
    for stem in _STEMS:
        index, whole = path / f"{stem}.safetensors.index.json", path / f"{stem}.safetensors"
        if whole.is_file():
            return open_safetensors(whole)[1]
        if index.is_file():
            return _open_shards(path, index)
    pickles = sorted(file.name for file in path.glob("*") if file.suffix in _PICKLES)
    if pickles:
        raise ValueError(
            f"{path / pickles[0]} is a pickle, which can run code and is not opened here: fetch the release's "
            f"safetensors, or, if you trust it, load it with diffusers and save it again with "
            f"save_pretrained(…, safe_serialization=True)"
        )
    raise ValueError(f"{path} holds no {_STEMS[0]}.safetensors: fetch the release's weights into it")


def _open_shards(path: Path, index: Path) -> dict[str, Stored]:
    shard_of = read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise ValueError(f"{index} names no weights: fetch the release again")
    names = sorted(set(map(str, shard_of.values())))
    if strange := [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]:
        raise ValueError(f"{index} names {strange[0]}, which is no safetensors file beside it")
    if absent := [name for name in names if not (path / name).is_file()]:
        raise ValueError(f"{path} lacks {listed(absent)}: fetch the release again")
    return {name: stored for shard in names for name, stored in open_safetensors(path / shard)[1].items()}


def require_package(package: str, extra: str, why: str) -> None:
    """Raise ValueError where a package of one of the extras is not installed."""
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise ValueError(f"{why} needs the package {package}: install it with  pip install 'spresso[{extra}]'")
