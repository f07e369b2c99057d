"""The public weights that each `model=` needs: what they are, where they come from, their licence, how to get them.

`RELEASES` is the only list of these facts. `spresso weights` prints it, errors about missing weights and the model
cards of codecs take their words from it, and a test holds docs/pretrained.md to it. Importing this module needs no
torch.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from models.hub import is_hub_name, locate, split_name
from models.readable import folder_trouble


@dataclass(frozen=True)
class Licence:
    """The licence of weights."""

    name: str
    identifier: str
    """That of the hub's model cards; `other` for a licence that the hub has no name for."""
    link: str
    note: str = ""
    """What else binds whoever uses the weights, or a codec trained on them."""


@dataclass(frozen=True)
class Release:
    """Published weights that a recipe can start from."""

    model: str
    """The choice of `model=` that they belong to: a file in configs/model/."""
    name: str
    what: str
    """Which models they are."""
    source: str
    licence: Licence
    millions: int
    """Parameters, in millions. Woosh's are counted from its published configs, the others are their authors' figures:
    arXiv 2407.14358 for Stable Audio Open, and the README of Stable Audio 3, whose text encoder is not among them."""
    place: str
    """Where recipes look for them: a folder, or a name in the hub's cache."""
    commands: tuple[str, ...]
    """Shell commands that fetch them to `place`."""
    hub: str = ""
    """Their name on the hub; empty if they are not there."""
    first: str = ""
    """What has to be done once before the commands."""
    archive: str = ""
    """The file that is downloaded and unpacked, and `sha256` its hash as GitHub publishes it beside the file. No hash
    is published of what lies in it."""
    sha256: str = ""

    def found(self) -> Path | None:
        """Return the folder here that holds these weights, whole or not; None if there is none."""
        path = locate(self.place)
        return path if path.is_dir() else None


CC_BY_NC = Licence("CC BY-NC 4.0", "cc-by-nc-4.0", "https://creativecommons.org/licenses/by-nc/4.0/")
STABILITY = Licence(
    "Stability AI Community License",
    "other",
    "https://stability.ai/license",
    note="free below a yearly revenue; it sets terms for publishing what is derived from the weights",
)
STABILITY_GEMMA = Licence(
    "Stability AI Community License and Gemma Terms of Use",
    "other",
    "https://stability.ai/license",
    note=f"{STABILITY.note}; the text encoder is under https://ai.google.dev/gemma/terms",
)

CONVERTER = (
    "https://raw.githubusercontent.com/huggingface/diffusers/main/scripts/convert_stable_audio_3_to_diffusers.py"
)
"""Turns a Stable Audio 3 as its authors publish it into diffusers' layout. It reorders tensors and computes others, so
that a renaming would not do."""
_WOOSH = "https://github.com/SonyResearch/Woosh"
_OPEN = "stabilityai/stable-audio-open-1.0"
_GATED = "log in with  hf auth login  and accept the licence at https://huggingface.co/{}"
_T5GEMMA = "google/t5gemma-b-b-ul2"


def conversion(source: str | Path, folder: str | Path) -> str:
    """Return the command that converts a Stable Audio 3 of its authors' own layout into a folder of diffusers' layout.

    Args:
        source: the release's name on the hub, or the folder that holds `model_config.json` and `model.safetensors`.
        folder: the folder to write.
    """
    name = shlex.quote(str(source))
    local = f"{name}/model.safetensors --model_config_path {name}/model_config.json"
    given = local if Path(source).is_dir() else name
    target = shlex.quote(str(folder))
    return f"python convert_stable_audio_3_to_diffusers.py --checkpoint_path {given} --output_dir {target}"


def _woosh(name: str, what: str, millions: int, sha256: str) -> Release:
    archive = f"{name}.zip"
    return Release(
        "woosh",
        name,
        what,
        f"{_WOOSH}/releases",
        CC_BY_NC,
        millions,
        f"checkpoints/{name}",
        (f"curl -LO {_WOOSH}/releases/download/v1.0.0/{archive}", f"spresso weights {archive}", f"unzip {archive}"),
        archive=archive,
        sha256=sha256,
    )


def _stable_audio_3(form: str, millions: int) -> Release:
    hub, place = f"stabilityai/stable-audio-3-{form}", f"checkpoints/stable-audio-3-{form}"
    gated = _T5GEMMA if form.endswith("-base") else f"{_T5GEMMA} and https://huggingface.co/{hub}"
    return Release(
        "stable_audio_3",
        f"Stable Audio 3 {form}",
        "D, AudioAE, text encoder (T5Gemma)",
        f"https://huggingface.co/{hub}",
        STABILITY_GEMMA,
        millions,
        place,
        (f"hf download {hub}", f"hf download {_T5GEMMA}", f"curl -LO {CONVERTER}", conversion(hub, place)),
        hub=hub,
        first=_GATED.format(gated),
    )


RELEASES = (
    _woosh("Woosh-AE", "AudioAE", 221, "d6f77e3792ee43c21da580f39d6576e0da3e4b46b949223259adf36036c1f9af"),
    _woosh("Woosh-Flow", "D", 337, "f748c70972798ca09f98fe49e505e700ccfe4d38b3b12b955a06cb89aa0e024c"),
    _woosh("Woosh-DFlow", "D as a flow map", 339, "26cfe732500e3952c58aaaf433d29d75b46d42afe5e52f49430d6093eabfdb04"),
    Release(
        "stable_audio_open",
        "Stable Audio Open 1.0",
        "D, AudioAE, text encoder (T5)",
        f"https://huggingface.co/{_OPEN}",
        STABILITY,
        1057 + 156 + 109,
        _OPEN,
        (f'hf download {_OPEN} --include "*/*.json" "*/*.safetensors" "*/*.model"',),
        hub=_OPEN,
        first=_GATED.format(_OPEN),
    ),
    _stable_audio_3("small-sfx-base", 433),
    _stable_audio_3("small-music-base", 433),
    _stable_audio_3("medium-base", 1400),
    _stable_audio_3("small-sfx", 433),
    _stable_audio_3("small-music", 433),
    _stable_audio_3("medium", 1400),
)

FAMILIES = {"woosh": "woosh", "oobleck": "stable_audio_open", "same": "stable_audio_3"}
"""The kinds of AudioAE with released weights, and the choice of `model=` that each belongs to."""


def release_at(folder: str | Path) -> Release | None:
    """Return the release that a folder or a hub name is called after; None if it is called like none."""
    path = str(folder)
    return next((each for each in RELEASES if path == each.hub or Path(path).name == Path(each.place).name), None)


def missing(folder: str | Path) -> str:
    """Return the error message for a folder, or a hub name, that `models.hub.locate` did not find."""
    release = release_at(folder)
    if release and str(folder) != release.hub:
        return (
            f"{folder} {folder_trouble(Path(folder)) or 'is not a folder'}: give the folder of {release.name}, or get "
            "it with the commands of  spresso weights"
        )
    if not is_hub_name(folder):
        return (
            f"{folder} {folder_trouble(Path(folder)) or 'is not a folder'}: give a folder of weights, or OWNER/NAME in "
            "the hub's cache;  spresso weights  lists the public ones and the commands that get them"
        )
    repo, revision = split_name(folder)
    command = f"hf download {repo}" + (f" --revision {revision}" if revision else "")
    return (
        f"{folder} is neither a folder nor a model in the hub's cache on this machine: give a folder, or download it "
        f"with  {command}  (for a gated model, first accept its licence on huggingface.co and run  hf auth login)"
    )


def family(model: str) -> tuple[Release, ...]:
    """Return the releases that belong to a choice of `model=`."""
    return tuple(each for each in RELEASES if each.model == model)
