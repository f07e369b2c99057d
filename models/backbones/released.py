"""Read releases in the layout of Hugging Face: a local folder, or one in the hub's cache, with one subfolder per model.

A subfolder holds `config.json` and safetensors, in one file or in shards with an index. Pickles are never opened.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.backbones.releases import CONVERTER, conversion, missing
from models.documents import fits
from models.documents import read_json as read_document
from models.hub import is_hub_name, locate, split_name
from models.weights import Stored, listed, open_safetensors

_MEND = "download the release again"
ORIGINAL_CONFIG = "model_config.json"
"""The config of a release in the layout of stable-audio-tools, which is not that of diffusers."""
_STEMS = ("diffusion_pytorch_model", "model")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def find_part(folder: str | Path, part: str) -> Path:
    """Return the subfolder `part` of a release.

    Raises:
        ValueError: the release is not on this machine, or it has no such part.
    """
    path = locate(folder)
    if not path.is_dir():
        raise ValueError(missing(folder))
    if not (path / part / "config.json").is_file():
        if (path / ORIGINAL_CONFIG).is_file():
            raise ValueError(original_layout(folder))
        raise ValueError(f"{path} has no {part}/config.json: give the complete release in diffusers' layout")
    return path / part


def original_layout(folder: str | Path) -> str:
    """Return the error message for a release as its authors publish it, with the command that converts it."""
    path = locate(folder)
    if not is_hub_name(folder) or Path(folder).exists():
        target = path.with_name(f"{path.name}-diffusers")
    else:
        target = Path("checkpoints") / split_name(folder)[0].partition("/")[2]
    return (
        f"{path} holds {ORIGINAL_CONFIG} and is in the layout of stable-audio-tools, which names and orders weights in "
        f"another way: convert it to diffusers' layout, and give {target} instead:  curl -LO {CONVERTER} && "
        f"{conversion(path, target)}"
    )


def class_of(folder: Path, part: str) -> str:
    """Return the name of the class of a release's part; an empty text if the part or the name is missing."""
    config = folder / part / "config.json"
    return str(read_json(config).get("_class_name", "")) if config.is_file() else ""


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raise ValueError if the file is missing or holds anything else."""
    try:
        return read_document(path, dict[str, Any], mend=_MEND)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: {_MEND}") from None


def read_config(path: Path, class_name: str, settings: type[Any]) -> dict[str, Any]:
    """Read the settings in a part's `config.json`, which must be exactly those of the `TypedDict` `settings`.

    Raises:
        ValueError: the config is another class's, a setting is missing or unknown, which could change what the weights
            mean, or a setting has another type.
    """
    known = settings.__annotations__
    values = read_json(path / "config.json")
    if values.get("_class_name", class_name) != class_name:
        raise ValueError(f"{path} holds a {values['_class_name']}, not a {class_name}")
    given = {name: value for name, value in values.items() if not name.startswith("_")}
    problems = [f"{name} is missing" for name in sorted(set(known) - given.keys())]
    problems += [f"{name} is unknown" for name in sorted(given.keys() - set(known))]
    if problems:
        raise ValueError(f"{path / 'config.json'}: {listed(problems)}")
    return fits(given, settings, path / "config.json", mend=_MEND)


def require(where: Path, conditions: Mapping[str, bool]) -> None:
    """Raise ValueError that lists the conditions (text → whether it holds) which do not hold."""
    if broken := [what for what, holds in conditions.items() if not holds]:
        raise ValueError(f"{where}: a model can be used only if {'; '.join(broken)}")


def open_part(path: Path) -> dict[str, Stored]:
    """Open a part's tensors without reading them, from one safetensors file or from the shards that an index names.

    Raises:
        ValueError: there is no safetensors file, or it is damaged, or there are only pickles.
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
            f"{path / pickles[0]} is a pickle, which can run code and is not opened: download the release's "
            f"safetensors, or, if you trust it, load it with diffusers and save it again with "
            f"save_pretrained(…, safe_serialization=True)"
        )
    raise ValueError(f"{path} holds no {_STEMS[0]}.safetensors: download the release's weights into it")


def _open_shards(path: Path, index: Path) -> dict[str, Stored]:
    shard_of = read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise ValueError(f"{index} names no weights: download the release again")
    names = sorted(set(map(str, shard_of.values())))
    if strange := [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]:
        raise ValueError(f"{index} names {strange[0]}, which is not a safetensors file in the same folder")
    if absent := [name for name in names if not (path / name).is_file()]:
        raise ValueError(f"{path} lacks {listed(absent)}: download the release again")
    return {name: stored for shard in names for name, stored in open_safetensors(path / shard)[1].items()}


def require_package(package: str, extra: str, why: str) -> None:
    """Raise ValueError if `package`, which belongs to the extra `extra`, is not installed; `why` needs it."""
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise ValueError(f"{why} needs the package {package}: install it with  pip install 'spresso[{extra}]'")
