"""The recordings of a report as files of the page: a script that holds the audio, and a spectrogram, for each.

A browser does not let a page that was opened from disk read other files, except images, styles and scripts. Each audio
file is therefore stored unchanged in a script, as base64, and loaded on demand.
"""

from __future__ import annotations

import base64
import io
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray

from models.disk_errors import patiently
from trainer.evaluate.report_file import recording
from trainer.page.system_cells import EvaluationReport
from trainer.spectrogram import log_mel_image, save_png

_FOLDERS = {"audio": ".js", "images": ".png"}
"""Folders of recordings → suffix of their files."""
IMAGE_SIZE = {"width": 440, "height": 112}
"""Size in pixels, twice what the page shows, for high-density displays."""


@dataclass(frozen=True)
class Take:
    """One recording of a clip: the name of its files in audio/ and images/, and its length."""

    name: str
    seconds: float

    @property
    def image(self) -> str:
        """Path of the spectrogram, relative to the page."""
        return f"images/{self.name}.png"


Takes = Mapping[tuple[str, str], Sequence[Take]]
"""Recordings by (key of the clip, key of the system)."""


def gather_takes(report: EvaluationReport, folder: Path, audio_root: Path) -> Takes:
    """Write audio and spectrogram of every recording into the folder.

    Raises:
        ValueError: a recording is missing or damaged.
        OSError: a recording can't be read now.
    """
    for name in _FOLDERS:
        (folder / name).mkdir(parents=True, exist_ok=True)
    takes: dict[tuple[str, str], list[Take]] = {}
    for clip, system, source, name in _recordings(report):
        takes.setdefault((clip, system), []).append(_add_take(recording(audio_root, source), folder, name))
    return takes


def require_recordings(report: EvaluationReport, audio_root: Path) -> None:
    """Raise ValueError if a recording that the report names is missing or damaged, OSError if it can't be read now."""
    for _, _, source, _ in _recordings(report):
        path = recording(audio_root, source)
        if not path.is_file():
            raise ValueError(f"{path} is missing: `spresso evaluate` makes it again")
        _read_sound(path)


def foreign_recordings(folder: Path) -> list[Path]:
    """Return what is in the page's folders of recordings, but was not written by `gather_takes`."""
    return [
        path
        for name, suffix in _FOLDERS.items()
        if (folder / name).exists()
        for path in ((folder / name).iterdir() if (folder / name).is_dir() else [folder / name])
        if not path.name.startswith(".")  # such as a desktop leaves in every folder that it shows
        if not re.fullmatch(rf"\d{{3,}}-\d{{2,}}-\d+-.*\{suffix}", path.name)
    ]


def remove_recordings(folder: Path) -> None:
    """Remove the folders of recordings of an older page."""
    for name in _FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)


def _recordings(report: EvaluationReport) -> Iterator[tuple[str, str, str, str]]:
    """Yield clip, system, source and name of each recording. Names are unique and safe as file names for any keys."""
    for row, clip in enumerate(report["clips"], start=1):
        for column, system in enumerate(report["systems"], start=1):
            for number, source in enumerate(clip["audio"].get(system["key"]) or [], start=1):
                name = f"{row:03}-{column:02}-{number}-{_plain(clip['key'])}-{_plain(system['key'])}"
                yield clip["key"], system["key"], source, name


def _add_take(source: Path, folder: Path, name: str) -> Take:
    content, samples, sample_rate = _read_sound(source)
    script = f'spressoSound("{name}","{base64.b64encode(content).decode()}");\n'
    (folder / "audio" / f"{name}.js").write_text(script, encoding="ascii")
    take = Take(name, seconds=len(samples) / sample_rate)
    save_png(log_mel_image(torch.from_numpy(samples.T), sample_rate, **IMAGE_SIZE), folder / take.image)
    return take


def _read_sound(source: Path) -> tuple[bytes, NDArray[np.float32], int]:
    """Return a recording's file, its samples (time, channels) and their rate.

    Raises:
        ValueError: it is missing or damaged.
        OSError: it can't be read now. It may be whole.
    """
    try:
        content = patiently(source.read_bytes)
        samples, sample_rate = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, FileNotFoundError) as error:
        raise ValueError(
            f"{source}: no readable audio ({error}): remove it, and `spresso evaluate` makes it again"
        ) from error
    return content, samples, sample_rate


def _plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", text)[:40]
