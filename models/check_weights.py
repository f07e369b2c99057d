"""Recognise a folder of weights, and check that it is whole: files, shapes, published hashes.

What is checked is what the loaders check: they read the configs and open the weights, but build the models without
memory. So a folder that passes here loads in a run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import nn

from models.backbones import stable_audio_3
from models.backbones.pretrained import in_diffusers_layout, load_autoencoder, load_dit
from models.backbones.released import ORIGINAL_CONFIG, class_of, original_layout, require_package
from models.backbones.releases import RELEASES, Release, family, missing, release_at
from models.backbones.woosh import load_woosh_folder
from models.export import DESCRIPTION
from models.hub import locate
from models.published_hashes import holds, published_files
from models.readable import describe_os_error, file_trouble
from models.weights import outlined

_NOT_ONE = (
    "gives no weights that a recipe can start from: give a folder of a public release (`spresso weights` lists them), "
    "or an export"
)


@dataclass(frozen=True)
class Finding:
    """What was found of one part of a folder."""

    part: str
    trouble: str = ""
    """What is missing or damaged, and what mends it; empty if the part is whole."""
    note: str = ""


@dataclass(frozen=True)
class Checked:
    """A folder of weights: what it is, and what was found of its parts."""

    folder: Path
    what: str
    release: Release | None
    findings: tuple[Finding, ...]

    @property
    def whole(self) -> bool:
        """Whether nothing is missing or damaged."""
        return not any(finding.trouble for finding in self.findings)


def check_weights(folder: str | Path) -> Checked:
    """Check a folder, a hub name in the cache, or a release's archive that was downloaded.

    Raises:
        ValueError: there is nothing, or something that no recipe can start from.
    """
    path = locate(folder)
    if path.suffix == ".zip":
        return _check_archive(path)
    if not path.is_dir():
        raise ValueError(missing(folder))
    what, release, parts = _recognised(folder, path)
    findings = [_finding(part, check) for part, check in parts.items()]
    return Checked(path, what, release, (*findings, *_hash_findings(path)))


Check = Callable[[], nn.Module | None]
"""Loads a part, or only outlines it; raises ValueError if it is missing or damaged."""


def _recognised(folder: str | Path, path: Path) -> tuple[str, Release | None, dict[str, Check]]:
    """Return what a folder holds, the release that it is called after or else one of the family, and its parts."""
    if (path / DESCRIPTION).exists():
        return "a codec that this program exported", None, {"codec": partial(_load_codec, path)}
    if (path / "dit.safetensors").exists():
        return "a D that this program exported", None, {"D": partial(load_dit, path, outlined)}
    if in_diffusers_layout(path):
        return _in_diffusers(folder, path)
    if (path / "config.yaml").exists():
        name = release_at(path)
        return "Woosh", name or family("woosh")[0], {name.what if name else "model": partial(_load_woosh, path)}
    raise ValueError(f"{folder} {_NOT_ONE}")


def _in_diffusers(folder: str | Path, path: Path) -> tuple[str, Release | None, dict[str, Check]]:
    third = class_of(path, "transformer") == stable_audio_3.CLASS
    model, kind = ("stable_audio_3", "same") if third else ("stable_audio_open", "oobleck")
    release = release_at(folder) or family(model)[0]
    if (path / ORIGINAL_CONFIG).is_file() and not (path / "transformer").exists():
        return "Stable Audio as its authors publish it", release_at(folder), {"layout": partial(_refuse_layout, folder)}
    return (
        "Stable Audio 3" if third else "Stable Audio Open",
        release,
        {
            "D": partial(load_dit, path, outlined),
            "AudioAE": partial(load_autoencoder, kind, path, outlined),
            "text encoder": partial(_load_text, path, third=third),
        },
    )


def _load_codec(path: Path) -> nn.Module:
    from models.codec import SPresso  # the codec imports the backbones

    return SPresso.from_pretrained(path)


def _load_woosh(path: Path) -> nn.Module:
    return load_woosh_folder(path, outlined)


def _load_text(path: Path, *, third: bool) -> nn.Module:
    """Load the text encoder and its tokenizer; transformers has no other way that finds every trouble."""
    from models.text_encoder import load_stable_audio_3_text, load_stable_audio_text

    require_package("transformers", "stable_audio", "the text encoder")
    return (load_stable_audio_3_text(path) if third else load_stable_audio_text(path)).model


def _refuse_layout(folder: str | Path) -> None:
    raise ValueError(original_layout(folder))


def _finding(part: str, check: Check) -> Finding:
    try:
        model = check()
    except ValueError as error:
        return Finding(part, trouble=str(error))
    except OSError as error:
        return Finding(part, trouble=describe_os_error(error))
    count = 0 if model is None else sum(parameter.numel() for parameter in model.parameters())
    return Finding(part, note=f"{count / 1e6:.0f} M parameters" if count >= 10**6 else f"{count} parameters")


def _hash_findings(folder: Path) -> Iterator[Finding]:
    """Yield what differs from its published hash, or how many files are as they were published."""
    files = list(published_files(folder))
    troubles = [_hash_trouble(path, expected) for path, expected in files]
    for (path, _), trouble in zip(files, troubles, strict=True):
        if trouble:
            yield Finding(path.relative_to(folder).as_posix(), trouble=trouble)
    if files and not any(troubles):
        yield Finding("hashes", note=f"{len(files)} files are as the hub published them")
    if not files:
        yield Finding("hashes", note="no published hash is at hand, so only files and shapes were checked")


def _hash_trouble(path: Path, expected: str) -> str:
    if trouble := file_trouble(path):
        return f"it {trouble}: download it again"
    return "" if holds(path, expected) else "it is not the file that the hub published: remove it and download it again"


def _check_archive(path: Path) -> Checked:
    """Check a release's archive by the hash that is published of it."""
    if trouble := file_trouble(path):
        raise ValueError(f"{path} {trouble}")
    release = next((each for each in RELEASES if each.archive == path.name), None)
    if release is None:
        raise ValueError(f"{path} is no archive whose hash is known: unpack it, and give the folder")
    trouble = "" if holds(path, release.sha256) else "the archive is not the published one: download it again"
    return Checked(path, f"the archive of {release.name}", release, (Finding("SHA-256", trouble, release.sha256),))
