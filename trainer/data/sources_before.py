"""Lists sound files as release 0.1.0 did, so that sets which it made are recognized.

It knew fewer suffixes, followed no link to a folder, and lost the marks of letters in captions that it made of names.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from trainer.data.captions import CaptionFile, captions_of, read_manifest, sidecar_captions
from trainer.data.find_sounds import CAPTIONS, Counts
from trainer.data.sources import MANIFESTS, SoundFile

_SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff")


def list_sources_as_before(audio: Path) -> list[SoundFile]:
    """Return the files of `find_sources` in release 0.1.0, without keys; raises ValueError if it refused them."""
    if audio.suffix.lower() in MANIFESTS:
        folder, entries = audio.parent, read_manifest(audio)
    else:
        folder, captions = audio, CaptionFile(audio / CAPTIONS)
        entries = {name: {"caption": captions.last_of(name)} for name in _names(audio)}
    sources = []
    for name, entry in entries.items():
        path = folder / name
        given = captions_of(entry) if isinstance(entry.get("caption"), str) else []
        caption = (given or sidecar_captions(path, Counts()) or [_caption_from_name(path.stem)])[0]
        facts = {key: value for key, value in entry.items() if key not in ("file", "caption")}
        sources.append(SoundFile(path, name, "", caption, facts))
    return sources


def _names(folder: Path) -> list[str]:
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in names if name.lower().endswith(_SUFFIXES) and name[0] != "."]
    return sorted(path.relative_to(folder).as_posix() for path in found)


def _caption_from_name(stem: str) -> str:
    words = re.sub(r"[\W_]+", " ", stem).strip()
    return re.sub(r"(?<=\D)[\d ]+$", "", words).lower() or "sound"
