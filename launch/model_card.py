"""The model card of a codec on the hub: what it is, how to use it, what it stands on, its figures, and sounds."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from models.backbones.pretrained import EMBEDDED
from models.backbones.releases import FAMILIES, Licence, Release, family, release_at
from models.codec import SPresso
from models.export import ExportDescription
from trainer.evaluate.tables import markdown
from trainer.formatting import in_markdown

_TAGS = ["audio", "neural-audio-codec", "audio-compression", "s-presso", "diffusion"]
_HERE = "THIS FOLDER"  # what the card of an export calls it


@dataclass(frozen=True)
class Base:
    """A model that a codec was trained on."""

    role: str
    """D or AudioAE."""
    release: Release | None
    """The release that the model is called after."""
    licence: Licence | None
    """None if it is not known."""

    @property
    def text(self) -> str:
        """A sentence that names the model and its licence."""
        name = f"[{self.release.name}]({self.release.source})" if self.release else "a release that is not named here"
        if self.licence is None:
            return f"{self.role}: {name}, whose licence is not known."
        note = f" ({self.licence.note})" if self.licence.note else ""
        return f"{self.role}: {name}, under the [{self.licence.name}]({self.licence.link}){note}."


def bases_of(description: ExportDescription) -> list[Base]:
    """Return the pretrained models that a codec stands on, without those that its export holds or a formula gives."""
    autoencoder, path = description["config"]["autoencoder"], description["base"]["path"]
    kind = str(autoencoder["kind"])
    of_kind = family(FAMILIES[kind])[0].licence if kind in FAMILIES else None
    found = [] if path is None else [_base("D", path, of_kind)]
    return found if kind in EMBEDDED else [*found, _base("AudioAE", str(autoencoder.get("folder")), of_kind)]


def _base(role: str, place: str, of_kind: Licence | None) -> Base:
    release = release_at(place)
    return Base(role, release, release.licence if release else of_kind)


def licences_of(bases: Sequence[Base]) -> list[Licence]:
    """Return the known licences of the models that a codec stands on, once each."""
    return list(dict.fromkeys(base.licence for base in bases if base.licence is not None))


def model_card(
    name: str,
    codec: SPresso,
    text: str,
    *,
    bases: Sequence[Base],
    licence: str | None,
    report: Mapping[str, Any] | None,
    sounds: Sequence[tuple[str, str]],
) -> str:
    """Return a model card.

    Args:
        name: the model's name on the hub.
        codec: the codec.
        text: the card of its export, which the user may have edited; settings at its head win over those made here.
        bases: the models that the codec stands on.
        licence: the hub's identifier of the codec's own licence; None: that of its base.
        report: the content of `evaluation.json`, if there is one.
        sounds: captions and file names, in the model, of sounds to hear.
    """
    from huggingface_hub import ModelCard, ModelCardData

    edited = text.startswith("---")
    given = ModelCard(text).data.to_dict() if edited else {}
    body = ModelCard(text).text if edited else text
    metadata = ModelCardData(**_metadata(codec, bases, licence) | given)
    parts = [body.replace(f'"{_HERE}"', f'"{name}"').strip(), _use(name), _standing(bases)]
    parts += [markdown(report).strip()] if report else []
    parts += [_hear(sounds)] if sounds else []
    return f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join(filter(None, parts)) + "\n"


def _metadata(codec: SPresso, bases: Sequence[Base], licence: str | None) -> dict[str, Any]:
    on_hub = list(dict.fromkeys(base.release.hub for base in bases if base.release and base.release.hub))
    rates = codec.config.rates or [codec.fitted_quantizer().books]
    fields: dict[str, Any] = {
        **_licence(licences_of(bases), licence),
        "library_name": "spresso",
        "pipeline_tag": "audio-to-audio",
        "tags": _TAGS,
        "sample_rate": codec.autoencoder.sample_rate,
        "channels": codec.autoencoder.channels,
        "bit_rates_kbps": [round(codec.kbps(books), 4) for books in rates],
        "model_hash": codec.model_hash,
    }
    return fields | ({"base_model": on_hub, "base_model_relation": "adapter"} if on_hub else {})


def _licence(bases: Sequence[Licence], own: str | None) -> dict[str, Any]:
    if own is not None:
        return {"license": own}
    if len(bases) == 1 and bases[0].identifier != "other":
        return {"license": bases[0].identifier}
    if not bases:
        return {}
    name = re.sub(r"[^a-z0-9]+", "-", " and ".join(base.name for base in bases).lower())
    return {"license": "other", "license_name": name, "license_link": bases[0].link}


def _use(name: str) -> str:
    commands = ("spresso encode in.wav out.spr", "spresso decode out.spr back.wav")
    return "## Use\n\n" + "\n".join(f"    {command} --codec {name}" for command in commands)


def _standing(bases: Sequence[Base]) -> str:
    if not bases:
        return ""
    lines = "\n".join(f"* {base.text}" for base in bases)
    return (
        f"## What it stands on\n\nThe weights here are useless without these models, which are not part of this "
        f"repository and have licences of their own; `spresso weights` says how to get them.\n\n{lines}"
    )


def _hear(sounds: Sequence[tuple[str, str]]) -> str:
    lines = [f'* {in_markdown(caption)}: <audio controls src="{file}"></audio>' for caption, file in sounds]
    return "\n".join(["## Sounds\n", *lines])
