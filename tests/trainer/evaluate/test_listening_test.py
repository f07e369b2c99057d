"""A blind test's folder: whole, fair, and telling nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml

from trainer.evaluate.listening_test import anchor_filter, write_listening_test

RATE = 48_000
SYSTEMS = ("original", "ceiling", "zq9", "opus")


@pytest.fixture
def report(tmp_path: Path) -> dict:
    """Two clips, three systems of other levels and lengths, and a floor."""
    rng = np.random.default_rng(0)
    (tmp_path / "audio").mkdir()
    clips = []
    for clip in ("bell", "wind"):
        audio = {}
        for number, key in enumerate((*SYSTEMS, "floor")):
            noise = 0.05 * (1 + number / 2) * rng.normal(size=RATE // 2 - 10 * number)
            soundfile.write(tmp_path / f"audio/{clip}.{key}.flac", noise, RATE, subtype="PCM_24")
            audio[key] = [f"audio/{clip}.{key}.flac"]
        clips.append({"key": clip, "audio": audio})
    roles = ("original", "ceiling", "system", "baseline", "floor")
    systems = [{"key": key, "role": role} for key, role in zip((*SYSTEMS, "floor"), roles, strict=True)]
    return {"recipe": "demo 1", "sample_rate": RATE, "systems": systems, "clips": clips, "model_hash": "ab"}


def write(report: dict, tmp_path: Path, name: str = "test", **options):
    return write_listening_test(report, tmp_path, tmp_path / name, **options)


def trials_of(made) -> list[dict]:
    pages = yaml.safe_load(made.config.read_text())["pages"]
    assert [page["type"] if isinstance(page, dict) else page[0] for page in pages] == [
        "generic", "volume", "random", "finish"
    ]  # fmt: skip
    return pages[2][1:]


def test_a_link_out_of_the_evaluation_is_not_copied(report, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "audio").rename(tmp_path / "run/audio")
    (tmp_path / "run/audio/bell.zq9.flac").rename(tmp_path / "private.flac")
    (tmp_path / "run/audio/bell.zq9.flac").symlink_to("../../private.flac")
    with pytest.raises(ValueError, match=rf"bell\.zq9\.flac leads out of {tmp_path}/run to {tmp_path}/private\.flac"):
        write_listening_test(report, tmp_path / "run", tmp_path / "test")
    assert not (tmp_path / "test").exists()


def test_the_structure_is_webmushras(report, tmp_path):
    made = write(report, tmp_path)
    assert (made.trials, made.conditions) == (2, 5)
    test = yaml.safe_load(made.config.read_text())
    assert set(test) >= {"testname", "testId", "bufferSize", "stopOnErrors", "remoteService", "pages"}
    assert test["pages"][-1]["writeResults"] is True
    for number, trial in enumerate(trials_of(made), start=1):
        assert (trial["type"], trial["id"]) == ("mushra", f"trial{number}")
        assert trial["createAnchor35"] is trial["createAnchor70"] is False
        assert list(trial["stimuli"]) == ["C1", "C2", "C3", "C4", "C5"]
        for file in (trial["reference"], *trial["stimuli"].values()):
            assert (tmp_path / "test" / file).is_file()
            assert file.startswith("configs/resources/demo-1/")


def test_the_key_opens_it_and_lies_outside(report, tmp_path):
    made = write(report, tmp_path)
    assert made.key == tmp_path / "test.key.json"
    assert not list((tmp_path / "test").rglob("*key*"))
    key = json.loads(made.key.read_text())["trials"]
    for trial in trials_of(made):
        of_trial = key[trial["id"]]
        assert sorted(of_trial["conditions"].values()) == ["anchor35", "anchor70", "ceiling", "opus", "zq9"]
        for place, file in trial["stimuli"].items():
            assert of_trial["files"][file] == of_trial["conditions"][place]
        assert of_trial["files"][trial["reference"]] == "reference"


def test_nothing_in_the_folder_tells_the_systems(report, tmp_path):
    made = write(report, tmp_path)
    names = [path.stem for path in (tmp_path / "test").rglob("*.wav")]
    assert len(set(names)) == 12
    text = made.config.read_text() + " ".join(names)
    assert not [word for word in ("zq9", "opus", "ceiling", "bell", "wind", "anchor3", "floor") if word in text]
    orders = [list(trial["conditions"].values()) for trial in json.loads(made.key.read_text())["trials"].values()]
    assert orders[0] != orders[1]
    sizes = {path.stat().st_size for path in (tmp_path / "test").rglob("*.wav")}
    assert len(sizes) == 1


def test_the_sounds_are_of_one_rate_length_and_level(report, tmp_path):
    made = write(report, tmp_path)
    for trial in json.loads(made.key.read_text())["trials"].values():
        sounds = {version: soundfile.read(tmp_path / "test" / file) for file, version in trial["files"].items()}
        assert {rate for _, rate in sounds.values()} == {RATE}
        assert {audio.shape for audio, _ in sounds.values()} == {(RATE // 2,)}
        level = {version: np.sqrt(np.mean(audio**2)) for version, (audio, _) in sounds.items()}
        for version in ("ceiling", "zq9", "opus"):
            assert level[version] == pytest.approx(level["reference"], rel=1e-3)


def test_what_is_next_to_silent_stays_soft(report, tmp_path):
    soundfile.write(tmp_path / report["clips"][0]["audio"]["zq9"][0], np.full(RATE // 2, 1e-3), RATE)
    made = write(report, tmp_path)
    files = json.loads(made.key.read_text())["trials"]["trial1"]["files"]
    file = next(file for file, version in files.items() if version == "zq9")
    assert np.abs(soundfile.read(tmp_path / "test" / file)[0]).max() < 5e-3


@pytest.mark.parametrize("cutoff", [3500.0, 7000.0])
def test_an_anchor_is_the_reference_below_its_frequency(cutoff):
    audio = np.random.default_rng(0).normal(size=(1, RATE)).astype(np.float32)
    spectra = [np.abs(np.fft.rfft(one[0])) for one in (audio, anchor_filter(audio, cutoff, RATE))]
    hertz = np.fft.rfftfreq(RATE, 1 / RATE)
    below, above = hertz < cutoff - 200, hertz > cutoff + 200
    np.testing.assert_allclose(np.median(spectra[1][below] / spectra[0][below]), 1, atol=0.01)
    assert np.sqrt(np.mean(spectra[1][above] ** 2)) < 0.003 * np.sqrt(np.mean(spectra[0][above] ** 2))
    product = np.fft.irfft(np.fft.rfft(anchor_filter(audio, cutoff, RATE)[0]) * np.conj(np.fft.rfft(audio[0])))
    assert product.argmax() == 0  # not delayed


def test_a_seed_is_a_test(report, tmp_path):
    same = [write(report, tmp_path, name).config.read_bytes() for name in ("one", "two")]
    assert same[0] == same[1]
    assert write(report, tmp_path, "three", seed=1).config.read_bytes() != same[0]
    assert write(report, tmp_path, "one", clips=1).trials == 1
    assert len(list((tmp_path / "one").rglob("*.wav"))) == 6  # those of the older test are gone


def test_what_cannot_be_heard_is_refused(report, tmp_path):
    with pytest.raises(ValueError, match="no audio of zq8: choose from ceiling, zq9, opus, floor"):
        write(report, tmp_path, systems=["zq8"])
    del report["clips"][1]["audio"]["opus"]
    with pytest.raises(ValueError, match="no audio of opus for wind"):
        write(report, tmp_path)
    assert write(report, tmp_path, systems=["zq9", "floor"]).conditions == 4
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("keep me")
    with pytest.raises(ValueError, match="holds files that are not of a listening test"):
        write(report, tmp_path, "mine")
    report["systems"] += [{"key": f"s{n}", "role": "system"} for n in range(9)]
    for clip in report["clips"]:
        clip["audio"] |= {f"s{n}": clip["audio"]["zq9"] for n in range(9)}
    with pytest.raises(ValueError, match="would have 15 versions; 12 are the most"):
        write(report, tmp_path)


def test_no_text_of_the_run_reaches_the_listener_s_page(report, tmp_path):
    hostile = "</script><img src=x onerror=alert(1)>"
    report["recipe"] = hostile
    for clip in report["clips"]:
        clip["caption"] = hostile
    made = write(report, tmp_path)
    name = "--script--img-src-x-onerror-alert-1--"
    assert made.config.name == f"{name}.yaml"
    text = made.config.read_text()
    assert not {"<", ">"} & set(text)
    assert yaml.safe_load(text)["testId"] == name
