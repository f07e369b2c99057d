from __future__ import annotations

import errno
import functools
import hashlib
import itertools
import json
import multiprocessing
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from trainer.data.synth.dataset import SOUND_KINDS, Sound, synthesize, write_sounds

ROOT = Path(__file__).parents[3]
HOURS = 0.018  # some twenty sounds

# Loudness in dBFS of sounds 0 to 19 of seed 0, of VERSION 1. Where a recipe is changed, raise VERSION and renew them.
LOUDNESS = [
    -24.95, -27.86, -28.63, -25.75, -25.16, -27.66, -37.33, -21.67, -37.95, -39.92,
    -19.67, -33.89, -25.27, -17.72, -28.54, -32.31, -22.96, -26.10, -9.95, -14.54,
]  # fmt: skip


@functools.cache
def sound_of_seed_7(index: int) -> Sound:
    return synthesize(seed=7, index=index)


@pytest.fixture(scope="module")
def sounds() -> list[Sound]:
    return [sound_of_seed_7(index) for index in range(10 * len(SOUND_KINDS))]


@pytest.fixture(scope="module")
def whole_set(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("synth") / "whole"
    write_sounds(folder, hours=HOURS, seed=3)
    return folder


def contents(folder: Path) -> dict[str, str]:
    """Return the hash of each file: a difference is to be read, not a megabyte of sound."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def loudness(audio: np.ndarray) -> float:
    return float(10 * np.log10(np.mean(audio.astype(np.float64) ** 2) + 1e-12))


def spectra(audio: np.ndarray) -> np.ndarray:
    """Energies (frames, bins) of 2048 samples each."""
    frames = np.lib.stride_tricks.sliding_window_view(audio, 2048)[::1024] * np.hanning(2048)
    return np.abs(np.fft.rfft(frames)) ** 2


def occupied_bins(audio: np.ndarray) -> float:
    """How many of the 1025 bins hold 95 % of a frame's energy, in the median frame."""
    ordered = -np.sort(-spectra(audio))
    shares = np.cumsum(ordered, axis=1) / ordered.sum(axis=1, keepdims=True)
    return float(np.median((shares < 0.95).sum(axis=1) + 1))


def captioned(kind: str, *words: str, without: str = ", in ", count: int = 4) -> list[Sound]:
    """The first sounds of a kind with the words in their captions; heard close by unless asked for otherwise."""
    every = (
        sound_of_seed_7(index) for index in range(SOUND_KINDS.index(kind), 200 * len(SOUND_KINDS), len(SOUND_KINDS))
    )
    fitting = (s for s in every if without not in s.caption and all(word in s.caption for word in words))
    return list(itertools.islice(fitting, count))


# --- single sounds ---


def test_a_sound_depends_on_seed_and_index_alone():
    first = synthesize(seed=1, index=23)
    synthesize(seed=1, index=24)
    again = synthesize(seed=1, index=23)
    assert (first.key, first.caption) == (again.key, again.caption)
    assert np.array_equal(first.audio, again.audio)
    for other in (synthesize(seed=2, index=23), synthesize(seed=1, index=23 + len(SOUND_KINDS))):
        assert other.kind == first.kind
        assert len(other.audio) != len(first.audio) or not np.array_equal(other.audio, first.audio)


def test_the_sounds_of_this_version_stay_what_they_are():
    heard = [loudness(synthesize(seed=0, index=index).audio) for index in range(len(SOUND_KINDS))]
    assert heard == pytest.approx(LOUDNESS, abs=0.02)


def test_every_kind_comes_as_often_with_a_key_of_its_own(sounds):
    assert len(SOUND_KINDS) == 20
    assert [sound.kind for sound in sounds] == list(SOUND_KINDS) * 10
    assert len({sound.key for sound in sounds}) == len(sounds)
    assert all(sound.key == f"{sound.kind}_{index:05d}" for index, sound in enumerate(sounds))


def test_sounds_are_sound(sounds):
    for sound in sounds:
        assert sound.audio.dtype == np.float32
        assert sound.audio.ndim == 1
        assert sound.sample_rate == 48_000
        assert 1.5 <= len(sound.audio) / 48_000 <= 5, sound.key
        assert np.isfinite(sound.audio).all(), sound.key
        assert 0.05 < np.abs(sound.audio).max() <= 0.9, sound.key
        assert abs(sound.audio.mean()) < 1e-3, sound.key
        assert np.abs(sound.audio[[0, -1]]).max() < 1e-4, f"{sound.key} clicks at an end"


def test_hardly_any_second_is_silent(sounds):
    quietest = [
        min(loudness(sound.audio[start : start + 48_000]) for start in range(0, len(sound.audio) - 47_999, 12_000))
        for sound in sounds
    ]
    assert min(quietest) > -66
    assert np.mean(np.array(quietest) < -55) < 0.03


def test_lengths_levels_and_captions_vary(sounds):
    assert np.std([len(sound.audio) / 48_000 for sound in sounds]) > 0.8
    assert np.std([loudness(sound.audio) for sound in sounds]) > 6
    for kind in SOUND_KINDS:
        assert len({sound.caption for sound in sounds if sound.kind == kind}) >= 3, kind


def test_captions_are_plain_phrases(sounds):
    for sound in sounds:
        assert sound.caption == " ".join(sound.caption.split())
        assert sound.caption.isascii()
        assert sound.caption[0].islower()
        assert not sound.caption.endswith((".", ","))


# --- what the kinds sound like ---


def test_a_siren_is_narrow_and_moves_where_wind_is_broad():
    yelps = captioned("siren", "yelps")
    winds = captioned("wind", "gusty")
    assert 1.3 * max(occupied_bins(sound.audio) for sound in yelps) < min(occupied_bins(sound.audio) for sound in winds)
    for sound in yelps:
        pitch = spectra(sound.audio).argmax(axis=1) * 48_000 / 2048
        assert np.percentile(pitch, 90) > 1.3 * np.percentile(pitch, 10)


def test_a_bell_is_narrow_where_rain_is_broad():
    bells, rains = captioned("bell"), captioned("rain")
    assert max(occupied_bins(sound.audio) for sound in bells) < min(occupied_bins(sound.audio) for sound in rains)


@pytest.mark.parametrize("kind", ["wood", "stone"])
def test_an_impact_decays(kind):
    for sound in captioned(kind, "slow"):
        peak = int(np.abs(sound.audio[:36_000]).argmax())
        blow, rest = sound.audio[peak : peak + 960], sound.audio[peak + 14_400 : peak + 16_800]
        assert loudness(blow) - loudness(rest) > 15, sound.key


def test_metal_rings_longer_than_wood_and_wood_longer_than_stone():
    def share_after_blow(kind: str) -> float:
        """How loud it is 0.15 s after the loudest moment, relative to it, in dB."""
        falls = []
        for sound in captioned(kind):
            peak = int(np.abs(sound.audio[:48_000]).argmax())
            falls.append(loudness(sound.audio[peak + 5_000 : peak + 6_000]) - loudness(sound.audio[peak : peak + 500]))
        return float(np.median(falls))

    assert share_after_blow("metal") > share_after_blow("wood") + 10 > share_after_blow("stone") + 12


def test_low_things_sound_lower_than_high_ones():
    def centre(kind: str, *words: str) -> float:
        energies = [spectra(sound.audio).sum(axis=0) for sound in captioned(kind, *words)]
        share = np.mean([energy / energy.sum() for energy in energies], axis=0)
        return float((share * np.fft.rfftfreq(2048, 1 / 48_000)).sum())

    assert centre("thunder", "low") < centre("engine") < centre("rain") < centre("glass")
    assert centre("wood", "a heavy wooden door") < centre("wood", "a small wooden box")
    assert centre("bell", "church") < centre("bell", "bicycle")


def test_captions_say_how_the_loudness_goes(sounds):
    for sound in captioned("siren", "growing louder", without="two-tone"):
        third = len(sound.audio) // 3
        assert loudness(sound.audio[-third:]) > loudness(sound.audio[:third]) + 6
    far = [loudness(sound.audio) for sound in sounds if "in the distance" in sound.caption]
    near = [loudness(sound.audio) for sound in sounds if "in the distance" not in sound.caption]
    assert np.median(far) < np.median(near) - 5


# --- sets ---


def test_captions_match_the_files(whole_set):
    lines = [json.loads(line) for line in (whole_set / "captions.jsonl").read_text().splitlines()]
    assert sorted(line["file"] for line in lines) == sorted(path.name for path in whole_set.glob("*.flac"))
    assert [line["kind"] for line in lines[: len(SOUND_KINDS)]] == list(SOUND_KINDS)[: len(lines)]
    for index, line in enumerate(lines):
        sound = synthesize(seed=3, index=index)
        assert (line["file"], line["caption"], line["kind"]) == (f"{sound.key}.flac", sound.caption, sound.kind)
        info = soundfile.info(whole_set / line["file"])
        assert (info.samplerate, info.channels, info.subtype) == (48_000, 1, "PCM_16")
        assert info.frames == round(line["seconds"] * 48_000) == len(sound.audio)
    seconds = [line["seconds"] for line in lines]
    assert sum(seconds[:-1]) < HOURS * 3600 <= sum(seconds)


def test_files_hold_the_sounds(whole_set):
    for index in (0, 9):
        sound = synthesize(seed=3, index=index)
        audio, _ = soundfile.read(whole_set / f"{sound.key}.flac", dtype="float32")
        assert np.abs(audio - sound.audio).max() <= 0.5 / 32768 + 1e-7


def test_the_bytes_are_the_same_with_more_workers(whole_set, tmp_path):
    told = []
    count = write_sounds(
        tmp_path / "two", hours=HOURS, seed=3, workers=2, progress=lambda done, total: told.append((done, total))
    )
    assert contents(tmp_path / "two") == contents(whole_set)
    assert told == [(done, count) for done in range(1, count + 1)]


def test_a_killed_run_leaves_no_worker_and_goes_on(whole_set, tmp_path):
    script = f"""
import os, signal, sys
from pathlib import Path
from trainer.data.synth.dataset import write_sounds

def die(done, total):
    if done == 6:
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    write_sounds(Path({str(tmp_path / "set")!r}), hours={HOURS}, seed=3, workers=2, progress=die)
"""
    (tmp_path / "script.py").write_text(script)
    # The workers share the output of their parent: it ends when the last of them has.
    run = subprocess.run(
        [sys.executable, tmp_path / "script.py"], env={"PYTHONPATH": str(ROOT)}, capture_output=True, timeout=25
    )
    assert run.returncode == -9, run.stderr.decode()
    left = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "set").glob("[!.]*.flac")}
    assert 6 <= len(left) < len(contents(whole_set)) - 2
    assert not (tmp_path / "set" / "captions.jsonl").exists()

    write_sounds(tmp_path / "set", hours=HOURS, seed=3)
    assert contents(tmp_path / "set") == contents(whole_set)
    assert all((tmp_path / "set" / name).stat().st_mtime_ns == time for name, time in left.items())


def test_ctrl_c_ends_the_workers_at_once(tmp_path):
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as held:
        write_sounds(tmp_path / "set", hours=6 * HOURS, seed=3, workers=2, progress=interrupt)
    assert held.tb, "whose frames live on, as they do where Ctrl-C ends the interpreter"
    assert not multiprocessing.active_children()
    assert len(list((tmp_path / "set").glob("*.flac"))) < 60  # of more than a hundred
    assert not list((tmp_path / "set").glob(".*"))


def test_a_whole_set_is_left_alone_and_a_spoilt_one_mended(tmp_path):
    folder = tmp_path / "set"
    told = []
    write_sounds(folder, hours=0.006, seed=5)
    before = contents(folder)
    write_sounds(folder, hours=0.006, seed=5, progress=lambda done, total: told.append(done))
    assert told == []
    names = sorted(path.name for path in folder.glob("*.flac"))
    (folder / names[0]).unlink()
    (folder / names[1]).write_bytes(b"not a sound")
    (folder / names[2]).write_bytes(b"")
    (folder / names[3]).write_bytes((folder / names[4]).read_bytes())
    write_sounds(folder, hours=0.006, seed=5, progress=lambda done, total: told.append(done))
    assert told == [len(names) - 3, len(names) - 2, len(names) - 1, len(names)]
    assert contents(folder) == before


@pytest.mark.parametrize("other", [{"seed": 6}, {"hours": 0.002}])
def test_a_folder_of_another_set_is_refused(tmp_path, other):
    wanted: dict[str, Any] = {"hours": 0.001, "seed": 5}
    write_sounds(tmp_path / "set", **wanted)
    before = contents(tmp_path / "set")
    with pytest.raises(ValueError, match="name another folder or delete it"):
        write_sounds(tmp_path / "set", **(wanted | other))
    assert contents(tmp_path / "set") == before


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="a new or an empty folder"):
        write_sounds(tmp_path, hours=0.001, seed=0)
    with pytest.raises(ValueError, match="a new or an empty folder"):
        write_sounds(tmp_path / "thesis.txt", hours=0.001, seed=0)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"thesis.txt": "precious"}


@pytest.mark.parametrize(
    "wrong", [{"hours": 0}, {"hours": float("nan")}, {"hours": float("inf")}, {"seed": -1}, {"workers": 0}]
)
def test_arguments_out_of_range_are_refused_before_anything_is_written(tmp_path, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        write_sounds(tmp_path / "set", **({"hours": 0.001, "seed": 0} | wrong))
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_file_that_cannot_be_written_is_an_os_error_and_leaves_nothing_by_half(whole_set, tmp_path, workers):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
    try:
        with pytest.raises(OSError, match="File too large") as error:
            write_sounds(tmp_path / "set", hours=HOURS, seed=3, workers=workers)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.errno == errno.EFBIG
    assert contents(tmp_path / "set").items() < contents(whole_set).items()
