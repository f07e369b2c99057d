"""Writes a blind listening test in the style of MUSHRA (ITU-R BS.1534) as a folder for webMUSHRA.

    OUT/configs/NAME.yaml               the test
    OUT/configs/resources/NAME/*.wav    its sounds, of equal sample rate, length and level, under random names
    OUT.key.json                        the system behind each sound: keep this file back, never put it on the server

webMUSHRA adds the hidden reference itself. The anchors are the reference, low-pass filtered at 3.5 and 7 kHz.
"""

from __future__ import annotations

import hashlib
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import yaml

from models.atomic_write import write_whole
from models.documents import read_json, to_json
from models.readable import require_file
from trainer.data.audio import Audio, read_audio, write_audio
from trainer.evaluate.report_file import recording

MOST_CONDITIONS = 12
"""The most versions in one trial, including the reference and the anchors, as BS.1534 recommends."""
ANCHORS = {"anchor35": 3500.0, "anchor70": 7000.0}
"""Cut-off frequencies in Hz."""
_PEAK = 0.99
_MOST_GAIN = 4.0  # 12 dB: a larger difference in level belongs to the system and is kept
_TAPS = 1023  # of the anchors' filter, whose transition band is 160 Hz wide at 48 kHz

_INTRODUCTION = (
    "You will hear several versions of the same sound. Rate how close each version is to the reference, from 0 (bad) "
    "to 100 (excellent). One of the versions is the reference itself. Please use headphones in a quiet place."
)
_QUESTION = "How close is each version to the reference?"


@dataclass(frozen=True)
class ListeningTest:
    """The files of a test, and its size."""

    config: Path
    key: Path
    trials: int
    conditions: int
    """Versions in each trial, without the hidden reference."""


def write_listening_test(
    report: Mapping[str, Any],
    audio_root: Path,
    out: Path,
    *,
    systems: Sequence[str] | None = None,
    clips: int | None = None,
    seed: int = 0,
    sole: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> ListeningTest:
    """Write the test's folder and its key; the same report and seed write the same files.

    Args:
        report: the report of an evaluation.
        audio_root: folder to which the report's audio paths are relative.
        out: folder to create; an older test in this folder is replaced, and its key renamed to OUT.key.N.json.
        systems: keys of the systems; None: all systems that the page plays, except floors.
        clips: number of the page's clips to use; None: all of them.
        seed: seed of the file names and of the order of versions.
        sole: makes `out`, and gives it to this process alone for as long as it writes.

    Raises:
        ValueError: a system or its audio is missing, there are too many systems, or `out` holds other files.
    """
    chosen = _chosen(report, systems)
    trials = list(report["clips"])[:clips]
    if not trials or (clips is not None and clips < 1):
        raise ValueError(
            "there are no clips to test: give --clips of at least 1, or raise evaluate.page_clips and run "
            "`spresso evaluate` again"
        )
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: give a folder")
    with sole():
        return _write(report, audio_root, out, chosen, trials, seed)


def _write(
    report: Mapping[str, Any], audio_root: Path, out: Path, chosen: list[str], trials: list[Any], seed: int
) -> ListeningTest:
    name = "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in report["recipe"])
    sounds = Path("configs") / "resources" / name
    key_file = out.with_name(f"{out.name}.key.json")
    _require_own(out, key_file)
    making = out.with_name(f".{out.name}.making")
    shutil.rmtree(making, ignore_errors=True)
    (making / sounds).mkdir(parents=True)
    pages, key = [], {}
    for number, clip in enumerate(trials, start=1):
        versions = _versions(clip, chosen, audio_root, report)
        shuffled = sorted(set(versions) - {"reference"})
        random.Random(f"{seed}/{clip['key']}").shuffle(shuffled)
        stimuli = {f"C{place}": version for place, version in enumerate(shuffled, start=1)}
        files = {version: str(sounds / f"{_blind(seed, clip['key'], version)}.wav") for version in versions}
        for version, audio_CS in versions.items():
            write_audio(making / files[version], audio_CS, report["sample_rate"])
        trial = f"trial{number}"
        pages.append(_page(trial, number, files, stimuli))
        key[trial] = {"clip": clip["key"], "conditions": stimuli, "files": {file: v for v, file in files.items()}}
    config = Path("configs") / f"{name}.yaml"
    text = yaml.safe_dump(_test(name, pages), sort_keys=False, allow_unicode=True)
    (making / config).write_text(text, encoding="utf-8")
    known = {"seed": seed, "model": report.get("model_hash"), "identity": report.get("identity"), "trials": key}
    _keep_other_key(key_file, content := to_json(known, indent=1, ascii=False) + "\n")
    write_whole(key_file, content)
    shutil.rmtree(out / "configs", ignore_errors=True)
    out.mkdir(exist_ok=True)
    (making / "configs").rename(out / "configs")
    making.rmdir()
    return ListeningTest(out / config, key_file, len(trials), len(chosen) + len(ANCHORS))


def anchor_filter(audio_CS: Audio, cutoff: float, sample_rate: int) -> Audio:
    """Low-pass audio (channels, samples) at `cutoff` Hz without delay, by a windowed sinc with 80 dB of attenuation."""
    times = np.arange(_TAPS) - _TAPS // 2
    kernel = 2 * cutoff / sample_rate * np.sinc(2 * cutoff / sample_rate * times) * np.blackman(_TAPS)
    length = audio_CS.shape[1] + _TAPS - 1
    spectrum = np.fft.rfft(audio_CS, length) * np.fft.rfft(kernel / kernel.sum(), length)
    filtered = np.fft.irfft(spectrum, length)[:, _TAPS // 2 :][:, : audio_CS.shape[1]]
    return filtered.astype(np.float32)


def _chosen(report: Mapping[str, Any], systems: Sequence[str] | None) -> list[str]:
    with_audio = {key for clip in report["clips"] for key in clip["audio"]}
    roles = {system["key"]: system["role"] for system in report["systems"] if system["key"] in with_audio}
    known = [key for key, role in roles.items() if role != "original"]
    if systems is None:
        systems = [key for key in known if roles[key] != "floor"]
    if unknown := [key for key in systems if key not in known]:
        raise ValueError(f"--systems: no audio of {', '.join(unknown)}: choose from {', '.join(known)}")
    if (count := len(systems) + len(ANCHORS) + 1) > MOST_CONDITIONS:
        raise ValueError(
            f"a trial would have {count} versions; {MOST_CONDITIONS} are the most, reference and anchors included: "
            f"choose with --systems some of {', '.join(systems)}"
        )
    return list(dict.fromkeys(systems))


def _require_own(out: Path, key_file: Path) -> None:
    """Raise ValueError if the folder, or the place of its key, holds anything but an older listening test."""
    key = _key_in(key_file)
    if key is None:
        raise ValueError(f"{key_file} is not the key of a listening test, which would replace it: give another folder")
    entries = {path.name for path in out.iterdir() if path.name[0] != "."} if out.exists() else set()
    # A killed command may have left the older test beside the new key, so the older keys count, too.
    older = [
        _key_in(path) or {} for path in out.parent.glob("*.key.*.json") if path.name.startswith(f"{out.name}.key.")
    ]
    trials = [trial for each in (key, *older) for trial in each.get("trials", {}).values()]
    known = {out / file for trial in trials for file in trial["files"]}
    known |= {path.parent.parent.parent / f"{path.parent.name}.yaml" for path in known}
    files = {path for path in out.rglob("[!.]*") if not path.is_dir()} if entries == {"configs"} else set()
    if entries - {"configs"} or files - known:
        raise ValueError(
            f"{out} holds files that are not of a listening test with the key {key_file}: give another folder"
        )


def _key_in(path: Path) -> dict[str, Any] | None:
    """Return the content of a key; {} if there is no file, None if it is not a key."""
    try:
        return dict(read_json(path, _Key, mend=""))
    except FileNotFoundError:
        return {}
    except ValueError:
        return None


class _Trial(TypedDict):
    files: dict[str, str]


class _Key(TypedDict):
    trials: dict[str, _Trial]


def _keep_other_key(path: Path, content: str) -> None:
    """Rename the key of another test, by which answers to that test can still be read."""
    if not path.exists() or path.read_text("utf-8") == content:
        return
    numbered = (path.with_name(f"{path.name.removesuffix('.json')}.{number}.json") for number in count(1))
    path.rename(next(place for place in numbered if not place.exists()))


def _versions(
    clip: Mapping[str, Any], systems: Sequence[str], root: Path, report: Mapping[str, Any]
) -> dict[str, Audio]:
    """Read all versions of a clip, (channels, samples) each, and bring them to the same level and length."""
    form = {"sample_rate": report["sample_rate"], "channels": report.get("channels", 1)}
    files = {"reference": clip["audio"].get("original"), **{key: clip["audio"].get(key) for key in systems}}
    if missing := [key for key, takes in files.items() if not takes]:
        raise ValueError(f"no audio of {', '.join(missing)} for {clip['key']}: choose others with --systems")
    paths = {key: recording(root, takes[0]) for key, takes in files.items() if takes}
    for path in paths.values():
        require_file(path)
    versions = {key: read_audio(path, **form) for key, path in paths.items()}
    versions |= {
        key: anchor_filter(versions["reference"], cutoff, report["sample_rate"]) for key, cutoff in ANCHORS.items()
    }
    samples = versions["reference"].shape[1]
    cut = {
        key: np.pad(audio[:, :samples], ((0, 0), (0, max(0, samples - audio.shape[1]))))
        for key, audio in versions.items()
    }
    return _levelled(cut)


def _levelled(versions: Mapping[str, Audio]) -> dict[str, Audio]:
    """Match the RMS level of each system to the reference's, within `_MOST_GAIN`.

    If a peak would clip, all versions are attenuated by the same factor. The anchors keep the level
    that their filter leaves, as in webMUSHRA.
    """
    target = _rms(versions["reference"])
    gains = {
        key: np.clip(target / max(_rms(audio), 1e-9), 1 / _MOST_GAIN, _MOST_GAIN) for key, audio in versions.items()
    }
    matched = {key: audio * (1.0 if key in ANCHORS else gains[key]) for key, audio in versions.items()}
    loudest = max(float(np.abs(audio).max()) for audio in matched.values())
    return {key: (audio * min(1.0, _PEAK / max(loudest, 1e-9))).astype(np.float32) for key, audio in matched.items()}


def _rms(audio: Audio) -> float:
    return float(np.sqrt(np.square(audio, dtype=np.float64).mean()))


def _blind(seed: int, clip: str, version: str) -> str:
    return hashlib.sha256(f"{seed}/{clip}/{version}".encode()).hexdigest()[:16]


def _page(trial: str, number: int, files: Mapping[str, str], stimuli: Mapping[str, str]) -> dict[str, Any]:
    return {
        "type": "mushra",
        "id": trial,
        "name": f"Sound {number}",
        "content": _QUESTION,
        "showWaveform": True,
        "enableLooping": True,
        "strict": False,  # strict mode requires the anchors that webMUSHRA makes itself
        "randomize": True,
        "reference": files["reference"],
        "createAnchor35": False,
        "createAnchor70": False,
        "stimuli": {place: files[version] for place, version in stimuli.items()},
    }


def _test(name: str, pages: list[dict[str, Any]]) -> dict[str, Any]:
    first = {"type": "generic", "id": "introduction", "name": "Welcome", "content": _INTRODUCTION}
    volume = {
        "type": "volume",
        "id": "volume",
        "name": "Volume",
        "stimulus": pages[0]["reference"],
        "defaultVolume": 0.5,
    }
    volume["content"] = "Set a comfortable volume. Please do not change it during the test."
    last = {
        "type": "finish",
        "name": "Thank you",
        "content": "You have completed the test.",
        "showResults": False,
        "writeResults": True,
    }
    return {
        "testname": "Listening test",
        "testId": name,
        "bufferSize": 2048,
        "stopOnErrors": True,
        "showButtonPreviousPage": True,
        "remoteService": "service/write.php",
        "pages": [first, volume, ["random", *pages], last],
    }
