"""Real recorded sounds for the tests, from Debian packages: used where they are installed, none is kept here."""

from __future__ import annotations

import zipfile
from pathlib import Path

from tests.system_packages import SOUNDS, require

_FOLDERS = (
    Path("/usr/share/sonic-pi/samples"),
    Path("/usr/share/games/minetest/games"),
    Path("/usr/share/sounds/freedesktop"),
    Path("/usr/share/sounds/alsa"),
)
_SUFFIXES = (".wav", ".ogg", ".oga", ".flac")
_ARCHIVE = Path("/usr/share/games/ufoai/base/0snd.pk3")


def recorded_sounds(cache: Path) -> list[Path]:
    """Return sorted paths of effects and some speech: 0.02 to 60 s, 8 to 96 kHz, mono and stereo, wav, flac and ogg.

    Args:
        cache: a folder for what lies in an archive; what an earlier call put there is used again.

    A test that calls this is skipped unless all of the packages are installed.
    """
    require(*SOUNDS)
    unpacked = cache / "ufoai"
    if not unpacked.is_dir():
        with zipfile.ZipFile(_ARCHIVE) as archive:
            archive.extractall(cache / "ufoai.partial")
        (cache / "ufoai.partial").rename(unpacked)
    return [path for folder in (*_FOLDERS, unpacked) for path in sorted(folder.rglob("*")) if path.suffix in _SUFFIXES]
