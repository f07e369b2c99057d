"""Write and read the files of a codec's export, the folder that `SPresso.from_pretrained` loads.

The LoRA has PEFT's layout; every other part is a safetensors file with its config in the header; `codec.json` names the
base model by its hash. This module only handles the files; `models.codec` assembles the parts.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from models.prior import Prior
from models.readable import folder_trouble, require_file
from models.sizes import CodecConfig
from models.weights import (
    open_safetensors,
    open_weights,
    require_fit,
    save_weights,
    write_safetensors,
)

if TYPE_CHECKING:
    from peft import LoraConfig

EXPORT_FORMAT = 1
ADAPTER = "default"
"""PEFT's name for the one adapter that D has."""
COPY_AGAIN = "copy it again from where it was made, or export it again"
_DESCRIPTION, _ADAPTER_FILE = "codec.json", "adapter_model.safetensors"

Parts = Mapping[str, tuple[nn.Module, dict[str, Any]]]
"""Maps the name of a part's file, without its suffix, to the module and its config."""


def write_export(
    folder: Path,
    *,
    parts: Parts,
    adapter: Mapping[str, Tensor],
    lora: LoraConfig,
    base: Path,
    description: Mapping[str, Any],
    card: str,
) -> None:
    """Write an export's folder, which appears whole or not at all; an older export at that path is replaced.

    Other files in the older export's folder are kept. Raises ValueError if there is something other than an export.

    Args:
        folder: the export's folder.
        parts: the modules to write, each to a file of its own.
        adapter: the LoRA's weights by their names in D.
        lora: PEFT's config for the LoRA.
        base: D's pretrained weights. A file is linked or copied into the export; the folder or the hub name of a
            release is only written down.
        description: the values that `codec.json` stores in addition to the format and the base's path: `model`,
            `base_hash`, `autoencoder_identity`, `config` and `parts`.
        card: text of the model card.
    """
    foreign = _foreign_files(folder)
    making = folder.with_name(folder.name + ".making")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    for name, (module, config) in parts.items():
        save_weights(making / f"{name}.safetensors", module.state_dict(), config)
    lora.save_pretrained(str(making))
    write_safetensors(making / _ADAPTER_FILE, named_as_in_peft(adapter), {"format": "pt"})
    if base.is_file():
        _link_or_copy(base, making / "dit.safetensors")
    described = {
        "format": EXPORT_FORMAT,
        "model": description["model"],
        "base": {"path": _stored_path(base), "hash": description["base_hash"]},
        "autoencoder_identity": description["autoencoder_identity"],
        "config": description["config"],
        "parts": description["parts"],
    }
    (making / _DESCRIPTION).write_text(json.dumps(described, indent=2))
    (making / "README.md").write_text(card)
    _exchange(folder, making, kept=foreign)


def _exchange(folder: Path, making: Path, *, kept: list[Path]) -> None:
    """Replace a folder by the one that was made, and move the files `kept`, such as a user's notes, into it."""
    if not folder.exists():
        making.rename(folder)
        return
    older = folder.rename(folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.older"))
    making.rename(folder)
    for path in kept:
        (older / path.name).rename(folder / path.name)
    shutil.rmtree(older)


def _foreign_files(folder: Path) -> list[Path]:
    """Return the entries of an export's folder that no export wrote; empty if there is no folder.

    Raises:
        ValueError: it is a file, or a folder without an export.
    """
    if not folder.exists():
        return []
    entries = list(folder.iterdir()) if folder.is_dir() else [folder]
    if entries and not (folder / _DESCRIPTION).is_file():
        raise ValueError(f"{folder} is no export, which would replace it: give another folder, or move it away")
    ours = (_DESCRIPTION, "README.md", "adapter_config.json")
    return [path for path in entries if path.name not in ours and path.suffix != ".safetensors"]


def read_description(folder: Path) -> dict[str, Any]:
    """Read an export's `codec.json`: `format`, `model`, `base`, `autoencoder_identity` and `config`.

    Exports since 0.2.0 also have `parts`, the hashes of what is not in the model's hash (`models.codec`).

    Raises:
        ValueError: the folder holds no export, a damaged one, or one in another format.
    """
    try:
        description = json.loads((folder / _DESCRIPTION).read_text())
    except (FileNotFoundError, NotADirectoryError):
        trouble = folder_trouble(folder) or "holds no codec"
        raise ValueError(f"{folder} {trouble}: give an export folder, such as runs/demo/finetune/export") from None
    except ValueError:
        description = None
    if not isinstance(description, dict):
        raise ValueError(f"{folder / _DESCRIPTION} is damaged: {COPY_AGAIN}")
    if description.get("format") != EXPORT_FORMAT:
        raise ValueError(
            f"{folder} was written in format {description.get('format')}, but this version reads format "
            f"{EXPORT_FORMAT}: export it again"
        )
    base = description.get("base")
    whole = isinstance(base, dict) and {"path", "hash"} <= base.keys() and isinstance(description.get("config"), dict)
    if not whole or not {"model", "autoencoder_identity"} <= description.keys():
        raise ValueError(f"{folder / _DESCRIPTION} is damaged: {COPY_AGAIN}")
    return description


def read_part_config(folder: Path, name: str) -> dict[str, Any] | None:
    """Read the config in the header of a part's file; return None if the export has no such part."""
    path = folder / f"{name}.safetensors"
    return open_weights(path)[0] if path.exists() else None


@torch.no_grad()
def fill_parts(folder: Path, parts: Parts) -> None:
    """Load each part's weights; raise ValueError if a file is missing, can't be opened or has other tensors."""
    for name, (module, _) in parts.items():
        path = folder / f"{name}.safetensors"
        require_file(path)
        stored, state = open_weights(path)[1], module.state_dict()
        require_fit(state, stored, f"the weights in {path}")
        for key, value in state.items():
            value.copy_(stored[key].read())


def parse_config(folder: Path, values: dict[str, Any]) -> CodecConfig:
    """Rebuild a codec's config; raise ValueError if the description lacks a value, or has one that is unknown."""
    try:
        return CodecConfig.from_dict(values)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / _DESCRIPTION} has a config that can't be read ({error}): {COPY_AGAIN}") from error


def make_prior(folder: Path, config: dict[str, Any]) -> Prior:
    """Build the prior from the config in its file, without its weights; raise ValueError if it is damaged."""
    try:
        return Prior(**config)
    except TypeError as error:
        raise ValueError(f"{folder / 'prior.safetensors'} is no prior ({error}): {COPY_AGAIN}") from error


def fill_adapter(folder: Path, parameters: Mapping[str, nn.Parameter]) -> None:
    """Load the LoRA's weights into D's parameters.

    Raises:
        ValueError: the file is missing or damaged, or its LoRA adapts other layers than `parameters`.
    """
    path = folder / _ADAPTER_FILE
    require_file(path)
    stored = open_safetensors(path)[1]
    if set(stored) != {_peft_name(name) for name in parameters}:
        raise ValueError(
            f"{path} does not fit this base model: it adapts other layers; "
            "give the base model that the codec was trained on"
        )
    require_fit(parameters, stored, f"the weights in {path}", _peft_name)
    for name, parameter in parameters.items():
        parameter.data.copy_(stored[_peft_name(name)].read())


def require_hashes(folder: Path, found: Mapping[str, str], expected: Mapping[str, str]) -> None:
    """Raise ValueError if the weights that were loaded are not those that an export was written with.

    Args:
        folder: the export.
        found: the hash of each thing that was loaded, by the words for it in the message.
        expected: the hashes on record, likewise.
    """
    differing = [
        f"{what} has the hash {str(found.get(what))[:8]}, not {str(expected.get(what))[:8]}"
        for what in {**expected, **found}
        if found.get(what) != expected.get(what)
    ]
    if differing:
        raise ValueError(
            f"{folder} is damaged, or holds files of another export ({'; '.join(differing)}): {COPY_AGAIN}"
        )


def named_as_in_peft(adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy the LoRA's weights to host memory and rename them as PEFT names them in its file."""
    return {_peft_name(name): value.detach().cpu().contiguous() for name, value in adapter.items()}


def _peft_name(name: str) -> str:
    """Return the name that PEFT gives a LoRA weight in its file."""
    return "base_model.model." + name.replace(f".{ADAPTER}.", ".")


def _stored_path(base: Path) -> str | None:
    """Return the base's path for `codec.json`: None for a file, which lies in the export; a hub name is kept."""
    return None if base.is_file() else str(base.resolve() if base.exists() else base)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)  # a hard link makes each export complete without storing the bytes twice
    except OSError:
        shutil.copyfile(source, target)
