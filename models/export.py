"""Write and read the files of a codec's export, the folder that `SPresso.from_pretrained` loads.

The LoRA has PEFT's layout; every other part is a safetensors file with its config in the header; `codec.json` names the
base model by its hash. This module only handles the files; `models.codec` assembles the parts.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NotRequired, TypedDict, TypeVar

import msgspec
import torch
from torch import Tensor, nn

from models.backbones.releases import missing
from models.decoder import Decoder
from models.documents import build, damaged, fits, read_json, to_json
from models.hub import fetch, is_remote, locate
from models.latent_encoder import LatentEncoder, Upsampler
from models.lora import file_rank
from models.readable import folder_trouble, require_file
from models.sizes import CodecConfig, LatentEncoderConfig
from models.weights import open_safetensors, open_weights, outlined, require_fit, save_weights, write_safetensors

if TYPE_CHECKING:
    from peft import LoraConfig

EXPORT_FORMAT = 1
DESCRIPTION, _ADAPTER_FILE, CARD = "codec.json", "adapter_model.safetensors", "README.md"
_BASE_FILE = "dit.safetensors"
_PARTS = ("latent_encoder", "upsampler", "quantizer", "prior", "distilled")
_PEFT_FILES = ("adapter_config.json", _ADAPTER_FILE)
_DISTILLED = "distilled"
"""The folder of the second adapter, which has PEFT's layout, too."""
_OWN = frozenset({DESCRIPTION, CARD, *_PEFT_FILES, _BASE_FILE, _DISTILLED, *(f"{part}.safetensors" for part in _PARTS)})
"""The files that exports may hold; all others in an export's folder are a user's."""

FILES = (*sorted(_OWN - {_DISTILLED}), *(f"{_DISTILLED}/{name}" for name in _PEFT_FILES))
"""The same by their paths in the export."""

_MEND = "copy it again from where it was made, or export it again"

Part = TypeVar("Part", bound=nn.Module)
Parts = Mapping[str, tuple[nn.Module, dict[str, Any]]]
"""Maps the name of a part's file, without its suffix, to the module and its config."""


Hash = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class _Format(TypedDict):
    format: int


class _Base(TypedDict):
    path: str | None
    hash: str


class ExportDescription(TypedDict):
    """The content of `codec.json`."""

    format: int
    model: Hash
    base: _Base
    autoencoder_identity: str
    config: dict[str, Any]
    """The fields of a `CodecConfig`, which `CodecConfig.from_dict` checks."""
    parts: NotRequired[dict[str, str]]
    """Hashes of what is not in the model's hash (`models.codec`); exports of 0.1.0 have none."""


def write_export(
    folder: Path,
    *,
    parts: Parts,
    adapter: Mapping[str, Tensor],
    distilled: Mapping[str, Tensor],
    lora: LoraConfig,
    base: Path,
    description: Mapping[str, Any],
    card: str,
) -> None:
    """Write an export's folder, which appears whole or not at all; an older export at that path is replaced.

    Other files in the older export's folder are kept, and so is a model card that was edited, under another name.
    Raises ValueError if there is something other than an export.

    Args:
        folder: the export's folder.
        parts: the modules to write, each to a file of its own.
        adapter: the LoRA's weights by their names in PEFT's file.
        distilled: those of the second LoRA, with which D decodes in few steps; empty if there is none.
        lora: PEFT's config of either LoRA.
        base: D's pretrained weights. A file is linked or copied into the export; the folder or the hub name of a
            release is only written down.
        description: the values that `codec.json` stores in addition to the format and the base's path: `model`,
            `base_hash`, `autoencoder_identity`, `config` and `parts`.
        card: text of the model card.
    """
    kept = _kept_files(folder, card=card, model=description["model"])
    making = folder.with_name(folder.name + ".making")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    for name, (module, config) in parts.items():
        save_weights(making / f"{name}.safetensors", module.state_dict(), config)
    for at, tensors in ((making, adapter), (making / _DISTILLED, distilled)):
        if tensors:
            lora.save_pretrained(str(at))
            write_safetensors(at / _ADAPTER_FILE, tensors, {"format": "pt"})
    if base.is_file():
        _link_or_copy(base, making / _BASE_FILE)
    described = {
        "format": EXPORT_FORMAT,
        "model": description["model"],
        "base": {"path": _stored_path(base), "hash": description["base_hash"]},
        "autoencoder_identity": description["autoencoder_identity"],
        "config": description["config"],
        "parts": description["parts"],
    }
    (making / DESCRIPTION).write_text(to_json(described, indent=2))
    (making / CARD).write_text(card, "utf-8")
    _exchange(folder, making, kept=kept)


def _exchange(folder: Path, making: Path, *, kept: Mapping[str, str]) -> None:
    """Replace a folder by the one that was made, and move into it the files `kept`: their names → their new names."""
    if not folder.exists():
        making.rename(folder)
        return
    older = folder.rename(folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.older"))
    making.rename(folder)
    for name, new_name in kept.items():
        (older / name).rename(folder / new_name)
    shutil.rmtree(older)


def _kept_files(folder: Path, *, card: str, model: str) -> dict[str, str]:
    """Return the entries of an export's folder that are a user's, with the names that they get beside a new export.

    Empty if there is no folder. A model card that was edited is a user's; `card` and `model` are the new export's.

    Raises:
        ValueError: it is a file, or a folder without an export.
    """
    if not folder.exists():
        return {}
    entries = list(folder.iterdir()) if folder.is_dir() else [folder]
    if entries and not (folder / DESCRIPTION).is_file():
        raise ValueError(
            f"{folder} was not written as an export, which would replace it: give another folder, or move it away"
        )
    kept = {path.name: path.name for path in entries if path.name not in _OWN}
    if _holds_more(folder / _DISTILLED):
        kept[_DISTILLED] = f"{_DISTILLED}.{secrets.token_hex(4)}.older"
    if (folder / CARD).exists() and not _is_own_card(folder, card.replace(model[:8], "")):
        kept[CARD] = f"{CARD}.{secrets.token_hex(4)}.older"
    return kept


def _holds_more(adapter: Path) -> bool:
    """Whether a folder of an adapter holds files of a user's."""
    return adapter.is_dir() and any(path.name not in _PEFT_FILES for path in adapter.iterdir())


def _is_own_card(folder: Path, text: str) -> bool:
    """Whether an export's model card has this text, apart from the hash of its model."""
    if not (folder / CARD).is_file():
        return False
    try:
        model = read_description(folder)["model"]
        return (folder / CARD).read_text("utf-8").replace(model[:8], "") == text
    except ValueError:
        return False


def find_export(folder: str | Path) -> Path:
    """Return the folder of an export; one on the hub, `owner/name[@revision]`, is downloaded unless it is cached.

    Only the files of an export are downloaded. A folder here wins over a name on the hub. Raises ValueError as
    `models.hub.fetch` does.
    """
    return fetch(folder, FILES) if is_remote(folder) else Path(folder)


def files_of(folder: Path) -> list[str]:
    """Return the paths of an export's own files, relative to its folder. All other files in it are a user's."""
    return [name for name in FILES if (folder / name).is_file()]


def locate_base(folder: Path, base: str | Path | None) -> Path:
    """Return where D's pretrained weights are: `base` if it is given, otherwise where the export says.

    Raises:
        ValueError: they are not there. The message says how to get them.
    """
    path = Path(base or read_description(folder)["base"]["path"] or folder / _BASE_FILE)
    if locate(path).exists() or path.parent == folder:
        return path
    raise ValueError(
        f"the codec in {folder} stands on weights that are not here (or give them as base=): {missing(path)}"
    )


def read_description(folder: Path) -> ExportDescription:
    """Read an export's `codec.json`.

    Raises:
        ValueError: the folder holds no export, a damaged one, or one in another format.
    """
    path = folder / DESCRIPTION
    try:
        description = read_json(path, _Format, mend=_MEND, finite=True)
    except (FileNotFoundError, NotADirectoryError):
        trouble = folder_trouble(folder) or "holds no codec"
        raise ValueError(f"{folder} {trouble}: give an export folder, such as runs/demo/finetune/export") from None
    if description["format"] != EXPORT_FORMAT:
        raise ValueError(
            f"{folder} was written in format {description['format']}, but this version reads format "
            f"{EXPORT_FORMAT}: export it again"
        )
    return fits(description, ExportDescription, path, mend=_MEND)


def read_config(folder: Path) -> CodecConfig:
    """Read the config of an export's codec; raises as `read_description` does."""
    return CodecConfig.from_dict(read_description(folder)["config"], folder / DESCRIPTION)


def read_part(folder: Path, name: str, kind: Callable[[dict[str, Any]], Part]) -> Part | None:
    """Build a part by its kind from the config in the header of its file; None if the export has no such part.

    The part is first outlined without memory, so that no config can ask for more weights than the file holds.

    Raises:
        ValueError: the config is not one of the part's, or the file's weights have other shapes.
    """
    path = folder / f"{name}.safetensors"
    if not path.exists() and not path.is_symlink():  # a link that leads nowhere is a part that is missing
        return None
    config, stored = open_weights(path)

    def build_part() -> Part:
        try:
            return kind(config)
        except (TypeError, ValueError) as error:
            raise damaged(path, f"its config builds no {name}: {error}", _MEND) from None

    outlined(build_part, stored, str(path))
    return build_part()


def require_sizes(folder: Path, config: CodecConfig, dit: Decoder) -> None:
    """Check the config of an export by the weights in its files, before anything of that size is built.

    Raises:
        ValueError: g or f has other weights or another config, or the adapter has another rank.
    """
    shapes, width, patch = config.latent_encoder, dit.config.width, dit.config.patch_size
    outlines: dict[str, Callable[[], nn.Module]] = {
        "latent_encoder": lambda: LatentEncoder(shapes),
        "upsampler": lambda: Upsampler(shapes, dit_width=width, dit_patch_size=patch),
    }
    for name, outline in outlines.items():
        path = folder / f"{name}.safetensors"
        stored_config, stored = open_weights(path)
        if build(LatentEncoderConfig, stored_config, path, mend=_MEND) != shapes:
            raise damaged(folder / DESCRIPTION, f"`config.latent_encoder` is not the config of {path.name}", _MEND)
        outlined(outline, stored, str(path))
    adapter = open_safetensors(folder / _ADAPTER_FILE)[1]
    ranks = {value.shape[0] for name, value in adapter.items() if name.endswith(".lora_A.weight")}
    if ranks != {file_rank(config.lora)}:
        raise damaged(folder / DESCRIPTION, f"`config.lora.rank` is not that of {_ADAPTER_FILE}", _MEND)


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


def read_adapter(folder: Path, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read the LoRA's weights, which have the names and shapes of `wanted`.

    Raises:
        ValueError: the file is missing, or its LoRA adapts other layers than `wanted`.
    """
    path = folder / _ADAPTER_FILE
    require_file(path)
    stored = open_safetensors(path)[1]
    if set(stored) != set(wanted):
        raise ValueError(
            f"{path} does not fit this base model: it adapts other layers; "
            "give the base model that the codec was trained on"
        )
    require_fit(wanted, stored, f"the weights in {path}")
    return {name: stored[name].read() for name in wanted}


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
        raise ValueError(f"{folder} is damaged, or holds files of another export ({'; '.join(differing)}): {_MEND}")


def _stored_path(base: Path) -> str | None:
    """Return the base's path for `codec.json`: None for a file, which lies in the export; a hub name is kept."""
    return None if base.is_file() else str(base.resolve() if base.exists() else base)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)  # a hard link makes each export complete without storing the bytes twice
    except OSError:
        shutil.copyfile(source, target)
