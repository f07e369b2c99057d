"""Finds the codec for `spresso encode`, `decode` and `info`: the export that --codec names, or one under runs/."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from launch.find_exports import find_exports
from models.codec import SPresso
from models.export import find_export, read_description
from models.readable import describe_os_error, folder_trouble
from trainer.file_names import printable


def newest_codec() -> Path:
    """Return the newest export under runs/ that can encode. Raises ValueError if there is none."""
    written = {path: time for path in _exports() if (time := _written_at(path)) is not None}
    if not written:
        raise ValueError("there is no codec under runs/: train one with `spresso run demo`, or give --codec FOLDER")
    return max(written, key=lambda path: written[path])


def _written_at(export: Path) -> float | None:
    """Return when an export was written; None if it can't encode or can't be read."""
    try:
        (export / "quantizer.safetensors").stat()
        return (export / "codec.json").stat().st_mtime
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        _pass_over(error)
        return None


def fitting_codec(model: str, source: Path) -> Path:
    """Return the export under runs/ whose model made a stream, of several the first that is distilled.

    Raises ValueError if there is none.
    """
    if found := list(exports_of(model)):
        return max(found, key=lambda export: (export / "distilled.safetensors").is_file())
    raise ValueError(
        f"{source} was made by model {model}, which is not under runs/: give its export with --codec FOLDER"
    )


def exports_of(model: str) -> Iterable[Path]:
    """Yield the exports under runs/ of a model, which is given by the first digits of its hash."""
    for path in _exports():
        try:
            found = read_description(path)["model"].startswith(model)
        except (OSError, ValueError) as error:  # a damaged export must not hide the others
            _pass_over(error)
            continue
        if found:
            yield path


def _exports() -> list[Path]:
    return find_exports(Path("runs"), _pass_over)


def _pass_over(error: Exception) -> None:
    """Say on stderr that an export, or a folder that may hold some, is passed over."""
    reason = describe_os_error(error) if isinstance(error, OSError) else str(error)
    print(f"spresso: {printable(reason)}; it is passed over", file=sys.stderr)


def codec_folder(codec: Path) -> Path:
    """Return the folder of the export that --codec names; one on the hub is downloaded unless it is cached.

    Raises ValueError unless it can be read.
    """
    folder = find_export(codec)
    if trouble := folder_trouble(folder):
        raise ValueError(
            f"--codec {codec} {trouble}: give an export folder, such as runs/demo/finetune/export, or OWNER/NAME on "
            "the hub"
        )
    return folder


def load_codec(folder: Path, device: str) -> SPresso:
    """Load a codec to `auto`, `cpu` or `cuda`, and name it on stderr. Raises ValueError."""
    folder = codec_folder(folder)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device; use --device cpu")
    spresso = SPresso.from_pretrained(folder, device=device)
    print(f"codec {printable(str(folder))}, model {spresso.model_hash[:8]}", file=sys.stderr)
    return spresso
