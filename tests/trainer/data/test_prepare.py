from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from models.autoencoder import SpectralAE
from tests.recorded import recorded_sounds
from trainer.data.clip_store import ClipStore
from trainer.data.groups import held_out
from trainer.data.locate import Asked
from trainer.data.prepare import PrepareReport, Tally, prepare
from trainer.data.shard_set import ShardSet
from trainer.data.sound_reader import SoundReader

RATE, HOP, CHANNELS = 8000, 80, 4
REPOSITORY = Path(__file__).parents[3]


class FakeAE:
    """The first values of each hop."""

    sample_rate, channels, latent_channels, hop = RATE, 1, CHANNELS, HOP

    def __init__(self, scale: float = 1.0):
        self.scale = scale

    def frames(self, samples: int) -> int:
        return -(-samples // HOP) + 1

    def encode(self, audio: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(audio, (0, HOP * self.frames(audio.shape[2]) - audio.shape[2]))
        return self.scale * padded.unflatten(2, (-1, HOP))[:, 0, :, :CHANNELS].transpose(1, 2)

    def identity(self) -> str:
        return f"fake-{self.scale}"


class DyingAE(FakeAE):
    """Kills its process when it has worked for a while."""

    encoded = 0

    def encode(self, audio: Tensor) -> Tensor:
        self.encoded += 1
        if self.encoded > 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode(audio)


def noise(name: str, seconds: float, *, rate: int = RATE, channels: int = 1) -> np.ndarray:
    """(samples, channels), another one for every name."""
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little")
    return np.random.default_rng(seed).uniform(-0.1, 0.1, (round(seconds * rate), channels)).astype(np.float32)


def write_sounds(folder: Path, seconds: dict[str, float]) -> Path:
    for name, length in seconds.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / name, noise(name, length), RATE, subtype="PCM_16")
    return folder


def run(audio: Path | str, out: Path, make_ae: Callable[[], Any] = FakeAE, **options: Any) -> PrepareReport:
    options = {"clip_seconds": 0.5, "holdout": 0.2, "seed": 0, **options}
    of_sounds = {name: options.pop(name) for name in ("audio_column", "caption_column", "patience") if name in options}
    return prepare(Asked(audio, own=tuple(options.pop("own", ())), **of_sounds), out, make_ae, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def all_metadata(out: Path) -> list[dict[str, Any]]:
    sets = [ShardSet(out / split) for split in ("train", "test") if (out / split).exists()]
    return [shards.metadata(id_) for shards in sets for id_ in range(len(shards))]


@pytest.fixture
def sounds(tmp_path: Path) -> Path:
    return write_sounds(tmp_path / "audio", {f"{n % 3}/sound{n:02d}.wav": 0.2 + 0.13 * (n % 9) for n in range(20)})


def test_a_folder_becomes_two_sets(sounds, tmp_path):
    out = tmp_path / "out"
    report = run(sounds, out, ae_options={"kind": "fake"})
    assert report.files == 20
    assert report.problems == []
    assert report.seconds == pytest.approx(sum(0.2 + 0.13 * (n % 9) for n in range(20)), abs=0.01)
    for split in ("train", "test"):
        shards = ShardSet(out / split)
        assert len(shards) == report.clips[split] > 0
        assert shards.has_audio == (split == "test")
        assert shards.shortest_frames * len(shards) == shards.total_frames == 51 * len(shards)
        info = shards.info
        assert (info.ae_identity, info.ae_options) == ("fake-1.0", {"kind": "fake"})
        assert (info.sample_rate, info.hop, info.latent_channels, info.clip_seconds) == (RATE, HOP, CHANNELS, 0.5)
    assert json.loads((out / "report.json").read_text()) == report.__dict__
    assert sorted(path.name for path in out.glob("[!.]*")) == ["report.json", "test", "train"]


def test_metadata_and_latents_fit_the_sound(sounds, tmp_path):
    run(sounds, tmp_path / "out")
    for split in ("train", "test"):
        shards = ShardSet(tmp_path / "out" / split)
        for id_ in range(len(shards)):
            about = shards.metadata(id_)
            audio = noise(about["source"], 0.2 + 0.13 * (int(about["source"][-6:-4]) % 9))[:, 0]
            start = round(about["start"] * RATE)
            clip = np.resize(audio[start : start + 4000], 4000) * 10 ** (about["gain_db"] / 20)
            assert about["seconds"] == pytest.approx(min(0.5, len(audio) / RATE), abs=1e-4)
            assert about["sample_rate"] == RATE
            assert about["gain_db"] % 0.5 == 0
            assert 10 * np.log10(np.mean(clip**2)) == pytest.approx(-23, abs=0.3)
            assert about["caption"] == "sound"
            assert about["key"].startswith(Path(about["source"]).stem)
            np.testing.assert_allclose(shards.latents([id_])[0][0, :50], clip[::HOP], atol=2e-4)
            if split == "test":
                np.testing.assert_allclose(shards.audio(id_)[0], clip, atol=1e-4)


@pytest.mark.parametrize(("seconds", "starts"), [
    (0.1, [0]), (0.5, [0]), (0.74, [0]), (0.75, [0, 0.25]), (0.99, [0, 0.49]), (1.0, [0, 0.5]),
    (1.24, [0, 0.5]), (1.25, [0, 0.5, 0.75]),
])  # fmt: skip
def test_how_files_are_cut(tmp_path, seconds, starts):
    write_sounds(tmp_path / "audio", {"a.wav": seconds})
    run(tmp_path / "audio", tmp_path / "out", holdout=0)
    assert [about["start"] for about in all_metadata(tmp_path / "out")] == starts
    assert [about["key"] for about in all_metadata(tmp_path / "out")] == [f"a-{n:04d}" for n in range(len(starts))]


def test_a_long_file_is_encoded_in_pieces_and_fills_more_than_a_shard(tmp_path):
    write_sounds(tmp_path / "audio", {"a.wav": 20.0, "b.wav": 0.5})
    run(tmp_path / "audio", tmp_path / "out", shard_mb=0.02, holdout=0)
    shards = ShardSet(tmp_path / "out/train")
    assert len(shards) == 41
    assert len(list((tmp_path / "out/train").glob("*.tar"))) > 3
    audio = noise("a.wav", 20.0)[:, 0]
    for id_ in range(40):
        clip = audio[4000 * id_ :][:4000] * 10 ** (shards.metadata(id_)["gain_db"] / 20)
        np.testing.assert_allclose(shards.latents([id_])[0][0, :50], clip[::HOP], atol=2e-4)


def test_it_is_the_same_to_the_byte_for_any_number_of_workers(sounds, tmp_path):
    (sounds / "broken.wav").write_bytes(b"RIFF")
    run(sounds, tmp_path / "one", workers=1, shard_mb=0.03)
    run(sounds, tmp_path / "three", workers=3, shard_mb=0.03)
    assert len(list((tmp_path / "one").rglob("*.tar"))) > 4
    assert contents(tmp_path / "one") == contents(tmp_path / "three")


def test_the_spectral_autoencoder_on_recorded_sounds(tmp_path, tmp_path_factory):
    """Whole, odd, stereo and short ones; in this process and in workers."""
    sounds = recorded_sounds(Path(tmp_path_factory.getbasetemp()))[::25]
    (tmp_path / "audio").mkdir()
    for number, path in enumerate(sounds):
        (tmp_path / "audio" / f"{path.stem}-{number}{path.suffix}").symlink_to(path)
    outs = [tmp_path / "out1", tmp_path / "out2"]
    for workers, out in enumerate(outs, 1):
        options: dict[str, Any] = {"clip_seconds": 1.0, "holdout": 0.15, "seed": 1, "shard_mb": 2}
        report = prepare(Asked(tmp_path / "audio"), out, SpectralAE, workers=workers, **options)
    assert contents(outs[0]) == contents(outs[1])
    assert report.files == len(sounds)
    train, test = ShardSet(outs[0] / "train"), ShardSet(outs[0] / "test")
    assert min(len(train), len(test)) > 2
    x0 = np.stack(train.latents(range(len(train)))).astype(np.float32)
    assert x0.shape == (len(train), 128, 101)
    assert 0.7 < x0.std() < 1.3
    ae = SpectralAE()
    again = ae.encode(torch.from_numpy(test.audio(0))[None]).numpy()[0]
    np.testing.assert_allclose(again, test.latents([0])[0], atol=0.02)


def test_odd_sounds(tmp_path):
    """Each is used, or left out for a reason that is reported."""
    audio = tmp_path / "audio"
    write_sounds(audio, {"good.wav": 1.0, "again/good.wav": 1.0})
    soundfile.write(audio / "8k.wav", noise("8k", 0.7), 8000)
    soundfile.write(audio / "11k stereo.flac", noise("11", 0.7, rate=11_025, channels=2), 11_025)
    soundfile.write(audio / "44k.ogg", noise("44", 0.7, rate=44_100), 44_100)
    soundfile.write(audio / "96k 24 bits.wav", noise("96", 0.7, rate=96_000), 96_000, subtype="PCM_24")
    soundfile.write(audio / "Tür – 門.wav", noise("t", 0.7), 8000)
    soundfile.write(audio / "silence.wav", np.zeros(8000), 8000)
    soundfile.write(audio / "constant.wav", np.full(8000, 0.5), 8000)
    soundfile.write(audio / "half silent.wav", np.concatenate([noise("h", 1.0), np.zeros((8000, 1))]), 8000)
    soundfile.write(audio / "one sample.wav", np.array([0.5]), 8000)
    soundfile.write(audio / "truncated.flac", noise("t", 1.0), 8000)
    (audio / "truncated.flac").write_bytes((audio / "truncated.flac").read_bytes()[:3000])
    (audio / "empty.mp3").touch()
    (audio / "text.wav").write_text("not a sound")
    report = run(audio, tmp_path / "out", shard_mb=0.01, holdout=0.4)
    assert {problem["file"]: problem["reason"] for problem in report.problems} == {
        "constant.wav": "is silent",
        "empty.mp3": "can't be read as sound: the file is empty",
        "half silent.wav": "is silent in 2 of 4 clips",
        "one sample.wav": "is too short: 0.00013 s",
        "silence.wav": "is silent",
        "text.wav": "can't be read as sound: Format not recognised",
        "truncated.flac": "is truncated or damaged: only 0.00 s of it can be read",
    }
    about = all_metadata(tmp_path / "out")
    assert {item["source"] for item in about} == {
        "good.wav", "again/good.wav", "8k.wav", "11k stereo.flac", "44k.ogg", "96k 24 bits.wav", "Tür – 門.wav",
        "half silent.wav",
    }  # fmt: skip
    assert len({item["key"].lower() for item in about}) == len(about) == sum(report.clips.values())
    assert json.loads((tmp_path / "out/report.json").read_text(encoding="utf-8"))["problems"] == report.problems


def test_latents_beyond_float16_are_left_out(tmp_path):
    write_sounds(tmp_path / "audio", {"a.wav": 0.5, "b.wav": 0.5})
    with pytest.raises(
        ValueError, match=r"none of the 2 .*: b\.wav has latents that exceed the range of float16 in 1 of 1"
    ):
        run(tmp_path / "audio", tmp_path / "out", lambda: FakeAE(1e6))


def test_a_complete_outcome_is_left_alone(sounds, tmp_path):
    first = run(sounds, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    steps: list[int] = []
    assert run(sounds, tmp_path / "out", workers=2, progress=lambda tally: steps.append(tally.done)) == first
    assert steps == []
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


@pytest.mark.parametrize(("other", "named"), [
    ({"clip_seconds": 0.25}, "clip_seconds"),
    ({"holdout": 0.5, "seed": 3}, "holdout, seed"),
    ({"shard_mb": 1}, "shard_mb"),
])  # fmt: skip
def test_an_outcome_of_other_options_is_refused(sounds, tmp_path, other, named):
    run(sounds, tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match=rf"other settings \({named}\): remove it, or give another folder"):
        run(sounds, tmp_path / "out", **other)
    with pytest.raises(ValueError, match=r"\(ae\)"):
        run(sounds, tmp_path / "out", lambda: FakeAE(2.0))
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("change", [
    lambda folder: write_sounds(folder, {"new.wav": 0.5}),
    lambda folder: write_sounds(folder, {"0/sound00.wav": 0.7}),
    lambda folder: (folder / "0/sound00.wav").unlink(),
    lambda folder: (folder / "0/sound00.txt").write_text("a new caption"),
])  # fmt: skip
def test_an_outcome_of_other_files_is_refused(sounds, tmp_path, change):
    run(sounds, tmp_path / "out")
    change(sounds)
    with pytest.raises(ValueError, match=r"\(files\)"):
        run(sounds, tmp_path / "out")


def test_a_lost_set_is_made_again(sounds, tmp_path):
    run(sounds, tmp_path / "out")
    before = contents(tmp_path / "out")
    (tmp_path / "out/test/set.json").unlink()
    run(sounds, tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_what_others_made_is_not_touched(sounds, tmp_path):
    (tmp_path / "other").mkdir()
    for report in ("", "[]", '{"other": 1}'):
        (tmp_path / "other/report.json").write_text(report)
        with pytest.raises(ValueError, match=r"report\.json is damaged .* not written by .*: give another folder"):
            run(sounds, tmp_path / "other")
    (tmp_path / "out/train").mkdir(parents=True)
    (tmp_path / "out/train/mine.tar").write_text("precious")
    with pytest.raises(ValueError, match="did not make: give another folder"):
        run(sounds, tmp_path / "out")
    assert (tmp_path / "out/train/mine.tar").read_text() == "precious"


class Interrupted(Exception):
    pass


def interrupt_at(file: int) -> Callable[[Tally], None]:
    def progress(tally: Tally) -> None:
        if tally.done == file:
            raise Interrupted

    return progress


@pytest.mark.parametrize("workers", [1, 2])
def test_what_was_interrupted_goes_on(sounds, tmp_path, workers):
    run(sounds, tmp_path / "whole", shard_mb=0.03)
    out, steps = tmp_path / "out", []
    for file in (1, 7, 13):
        with pytest.raises(Interrupted):
            run(sounds, out, shard_mb=0.03, workers=workers, progress=interrupt_at(file))
        assert not (out / "train/set.json").exists()
        for path in out.rglob("*.tar"):
            with tarfile.open(path) as tar:
                assert len(tar.getnames()) >= 2
    made = {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")}
    report = run(sounds, out, shard_mb=0.03, progress=lambda tally: steps.append(dataclasses.replace(tally)))
    assert contents(out) == contents(tmp_path / "whole")
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert steps[0].done > 1  # what was done counts
    assert 0 < steps[0].found < steps[0].seconds
    assert (steps[-1].done, steps[-1].files) == (20, 20)
    assert steps[-1].seconds == pytest.approx(report.seconds)


def test_what_was_interrupted_may_start_with_other_options(sounds, tmp_path):
    with pytest.raises(Interrupted):
        run(sounds, tmp_path / "out", shard_mb=0.03, progress=interrupt_at(12))
    run(sounds, tmp_path / "out", clip_seconds=0.25)
    run(sounds, tmp_path / "whole", clip_seconds=0.25)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_killed_and_run_again(sounds, tmp_path):
    """SIGKILL to the parent of two workers, which leave too."""
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, time\nfrom pathlib import Path\n"
        "from tests.trainer.data.test_prepare import run\n"
        "def progress(tally):\n    print(tally.done, flush=True)\n    time.sleep(0.05)\n"
        "if __name__ == '__main__':\n"
        "    run(Path(sys.argv[1]), Path(sys.argv[2]), shard_mb=0.03, workers=2, progress=progress)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, str(program), str(sounds), str(tmp_path / "out")]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        while int(process.stdout.readline()) < 10:
            pass
        process.kill()
        process.wait()
        deadline = time.monotonic() + 20
        while _group_lives(process.pid):
            assert time.monotonic() < deadline, "a worker outlives its parent"
            time.sleep(0.05)
    assert not (tmp_path / "out/report.json").exists()
    run(sounds, tmp_path / "out", shard_mb=0.03)
    run(sounds, tmp_path / "whole", shard_mb=0.03)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def _group_lives(group: int) -> bool:
    """Whether a process of the group runs (zombies don't)."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            return True
    return False


def test_a_worker_that_dies_is_told_and_not_waited_for(sounds, tmp_path):
    with pytest.raises(ValueError, match=r"a worker died, .* fewer workers"):
        run(sounds, tmp_path / "out", DyingAE, workers=2, shard_mb=0.03)
    run(sounds, tmp_path / "out", shard_mb=0.03)
    assert (tmp_path / "out/report.json").exists()


def test_what_cannot_be_used_is_refused(tmp_path):
    (tmp_path / "audio").mkdir()
    with pytest.raises(ValueError, match="holds no sound"):
        run(tmp_path / "audio", tmp_path / "out")
    (tmp_path / "audio/a.wav").write_text("nothing")
    soundfile.write(tmp_path / "audio/b.wav", np.zeros(8000), 8000)
    with pytest.raises(ValueError, match=r"none of the 2 sound files can be used: a.wav can't .*; b.wav is silent"):
        run(tmp_path / "audio", tmp_path / "out")
    write_sounds(tmp_path / "audio", {"c.wav": 1.0})
    for seed in range(20):  # either c or the silence is held out
        with pytest.raises(ValueError, match=r"give \d training clips and \d held-out clips, but .* needed: add files"):
            run(tmp_path / "audio", tmp_path / "out", seed=seed)
    assert run(tmp_path / "audio", tmp_path / "out", holdout=0).clips == {"train": 2, "test": 0}


def test_too_few_sounds_are_refused_before_any_training(tmp_path):
    write_sounds(tmp_path / "audio", {"a.wav": 5.0})
    with pytest.raises(ValueError, match=r"give 10 training clips and 0 held-out clips, but at least 1 and 2"):
        run(tmp_path / "audio", tmp_path / "out")
    write_sounds(tmp_path / "audio", {"b.wav": 0.5})
    for seed in range(20):  # a, or b of a single clip, is held out
        out = tmp_path / f"out{seed}"
        if held_out(["a", "b"], fraction=0.2, seed=seed) == {"a"}:
            assert run(tmp_path / "audio", out, seed=seed).clips == {"train": 1, "test": 10}
        else:
            with pytest.raises(ValueError, match="10 training clips and 1 held-out clips"):
                run(tmp_path / "audio", out, seed=seed)


@pytest.mark.parametrize("options", [{"holdout": 1.0}, {"holdout": -0.1}, {"clip_seconds": 0}, {"workers": 0}])
def test_options_out_of_range_are_refused(sounds, tmp_path, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}.* not"):
        run(sounds, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_files_of_one_base_name_are_held_out_together(tmp_path):
    write_sounds(tmp_path / "audio", {f"{folder}/s{n}.wav": 0.5 for n in range(30) for folder in ("a", "b")})
    run(tmp_path / "audio", tmp_path / "out", holdout=0.3)
    parts = []
    for split in ("train", "test"):
        shards = ShardSet(tmp_path / "out" / split)
        parts.append([Path(shards.metadata(id_)["source"]).stem for id_ in range(len(shards))])
    assert not set(parts[0]) & set(parts[1])
    assert len(parts[0]) + len(parts[1]) == 60
    assert 4 < len(parts[1]) < 32


def test_sounds_that_can_be_read_to_the_end_are_used_and_what_was_guessed_is_reported(tmp_path):
    audio = tmp_path / "audio"
    write_sounds(audio, {"good.wav": 1.0, "other.wav": 1.0})
    left = noise("l", 1.0)
    soundfile.write(audio / "phase.wav", np.concatenate([left, -left], axis=1), 8000, subtype="FLOAT")
    soundfile.write(audio / "integers.wav", noise("i", 1.0) * 32768, 8000, subtype="FLOAT")
    soundfile.write(audio / "live.wav", noise("u", 1.0), 8000)
    content = bytearray((audio / "live.wav").read_bytes())
    content[40:44] = bytes(4)
    (audio / "live.wav").write_bytes(content)
    report = run(audio, tmp_path / "out", holdout=0.4)
    problems = {problem["file"]: problem["reason"] for problem in report.problems}
    assert sorted(problems) == ["integers.wav", "live.wav", "phase.wav"]
    assert problems["integers.wav"].endswith(" in place of 1: they are divided by 32768")
    assert problems["live.wav"] == "has no length in its header: it is read to the end of the file"
    assert "they cancel each other (opposite phase)" in problems["phase.wav"]
    assert report.seconds == 4.0


@pytest.mark.parametrize("workers", [1, 2])
def test_clips_that_wait_on_disk_give_the_same_sets(tmp_path, monkeypatch, workers):
    audio = tmp_path / "audio"
    write_sounds(audio, {f"{letter}.wav": 5.0 for letter in "abcdef"})
    run(audio, tmp_path / "memory", holdout=0.4, workers=workers)
    stores, original = [], ClipStore.__init__

    def small(self: ClipStore, path: Path | None = None, *, limit: int = 0) -> None:
        stores.append(path)
        original(self, path, limit=1000)

    monkeypatch.setattr(ClipStore, "__init__", small)
    run(audio, tmp_path / "disk", holdout=0.4)
    assert len(stores) == 6
    assert all(path.parent == tmp_path / "disk/.prepare" for path in stores)
    assert contents(tmp_path / "disk") == contents(tmp_path / "memory")


def test_a_disk_that_fails_for_a_moment_changes_nothing_and_one_that_fails_on_stops_the_work(tmp_path, monkeypatch):
    audio = tmp_path / "audio"
    write_sounds(audio, {f"{letter}.wav": 1.0 for letter in "abcd"})
    run(audio, tmp_path / "whole", holdout=0.4)
    monkeypatch.setattr("trainer.data.clips._PAUSES", (0.0, 0.0))
    failures, opened = [1], SoundReader.__init__

    def failing(self: SoundReader, path: Path) -> None:
        if path.name == "c.wav" and failures[0]:
            failures[0] -= 1
            raise OSError(errno.EIO, "Input/output error", str(path))
        opened(self, path)

    monkeypatch.setattr(SoundReader, "__init__", failing)
    run(audio, tmp_path / "moment", holdout=0.4)
    assert failures == [0]
    assert contents(tmp_path / "moment") == contents(tmp_path / "whole")
    failures[0] = 100
    with pytest.raises(OSError, match=r"Input/output error.*c\.wav"):
        run(audio, tmp_path / "lasting", holdout=0.4)
    failures[0] = 0
    run(audio, tmp_path / "lasting", holdout=0.4)
    assert contents(tmp_path / "lasting") == contents(tmp_path / "whole")
