"""Real recorded sounds for the tests, from Debian packages: used where they are installed, none is kept here."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest

from trainer.data.audio import find_audio

PACKAGES = "ufoai-sound sonic-pi-samples minetest-data sound-theme-freedesktop alsa-utils"
_FOLDERS = (
    Path("/usr/share/sonic-pi/samples"),
    Path("/usr/share/games/minetest/games"),
    Path("/usr/share/sounds/freedesktop"),
    Path("/usr/share/sounds/alsa"),
)
_ARCHIVE = Path("/usr/share/games/ufoai/base/0snd.pk3")


def recorded_sounds(cache: Path) -> list[Path]:
    """Return sorted paths of effects and some speech: 0.02 to 60 s, 8 to 96 kHz, mono and stereo, wav, flac and ogg.

    Args:
        cache: a folder for what lies in an archive; what an earlier call put there is used again.

    Where none of the packages is installed the test that asks is skipped, but with CI set it fails.
    """
    unpacked = cache / "ufoai"
    if _ARCHIVE.is_file() and not unpacked.is_dir():
        with zipfile.ZipFile(_ARCHIVE) as archive:
            archive.extractall(cache / "ufoai.partial")
        (cache / "ufoai.partial").rename(unpacked)
    sounds = [path for folder in (*_FOLDERS, unpacked) if folder.is_dir() for path in find_audio(folder)]
    if not sounds:
        missing = f"no recorded sounds: apt-get install --no-install-recommends {PACKAGES}"
        if os.environ.get("CI"):
            raise RuntimeError(missing)
        pytest.skip(missing)
    return sounds
