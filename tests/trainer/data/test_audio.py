from __future__ import annotations

import io
import resource
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.recorded import recorded_sounds
from trainer.data.audio import encode_audio, read_audio, sound_mark, write_audio, write_blocks
from trainer.data.sound_reader import duration

RATE = 48_000


def tone(frequency: float, seconds: float, sample_rate: int = RATE, channels: int = 1) -> np.ndarray:
    """(samples, channels): the second channel has half the amplitude, and so on."""
    wave = 0.5 * np.sin(2 * np.pi * frequency * np.arange(round(seconds * sample_rate)) / sample_rate)
    return (wave[:, None] / np.arange(1, channels + 1)).astype(np.float32)


def amplitude(audio: np.ndarray, frequency: float) -> float:
    """Of that frequency in the middle of one channel."""
    middle = audio[len(audio) // 4 : -len(audio) // 4] * np.hanning(len(audio) // 2 + len(audio) % 2)[: len(audio) // 2]
    turns = np.exp(-2j * np.pi * frequency * np.arange(len(middle)) / RATE)
    return 4 * abs((middle * turns).sum()) / len(middle)


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000, 96_000])
@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg"])
def test_any_rate_is_brought_to_the_asked_one(tmp_path, rate, suffix):
    path = tmp_path / f"tone{suffix}"
    soundfile.write(path, tone(1000, 1.0, rate), rate)
    audio = read_audio(path, sample_rate=RATE)
    assert audio.shape == (1, RATE)
    assert audio.dtype == np.float32
    assert audio.flags.c_contiguous
    assert amplitude(audio[0], 1000) == pytest.approx(0.5, rel=0.03)


def test_mp3_is_read(tmp_path):
    soundfile.write(tmp_path / "tone.mp3", tone(1000, 1.0), RATE)
    audio = read_audio(tmp_path / "tone.mp3", sample_rate=RATE)
    assert abs(audio.shape[1] - RATE) < 3000  # MP3 may keep its padding
    assert amplitude(audio[0], 1000) == pytest.approx(0.5, rel=0.03)


@pytest.mark.parametrize(("have", "want", "gains"), [
    (1, 1, [1]), (1, 2, [1, 1]), (2, 2, [1, 1 / 2]), (2, 1, [3 / 4]), (6, 2, [0.40833, 0.40833]),
])  # fmt: skip
def test_channels_are_mixed(tmp_path, have, want, gains):
    soundfile.write(tmp_path / "a.wav", tone(1000, 0.1, channels=have), RATE, subtype="FLOAT")
    audio = read_audio(tmp_path / "a.wav", sample_rate=RATE, channels=want)
    expected = np.array(gains)[:, None] * tone(1000, 0.1).T
    np.testing.assert_allclose(audio, expected, atol=1e-5)


@pytest.mark.parametrize(("subtype", "step"), [
    ("PCM_U8", 2**-7), ("PCM_16", 2**-15), ("PCM_24", 2**-23), ("PCM_32", 2**-23), ("FLOAT", 0), ("DOUBLE", 0)
])  # fmt: skip
def test_any_depth_is_read_with_its_precision(tmp_path, subtype, step):
    wave = tone(440, 0.05)
    soundfile.write(tmp_path / "a.wav", wave, RATE, subtype=subtype)
    assert np.abs(read_audio(tmp_path / "a.wav", sample_rate=RATE) - wave.T).max() <= step


def test_one_sample_is_read(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.array([0.5]), RATE, subtype="FLOAT")
    np.testing.assert_array_equal(read_audio(tmp_path / "a.wav", sample_rate=RATE), [[0.5]])
    assert read_audio(tmp_path / "a.wav", sample_rate=2 * RATE).shape == (1, 2)
    with pytest.raises(ValueError, match="has no samples at 8000 Hz"):
        read_audio(tmp_path / "a.wav", sample_rate=8000)


def test_odd_names_are_read(tmp_path):
    path = tmp_path / "Tür öffnet – 門が開く 🚪.v2.WAV"
    soundfile.write(path, tone(440, 0.1), RATE, format="WAV")
    assert read_audio(path, sample_rate=RATE).shape == (1, 4800)


@pytest.mark.parametrize("kept", [0.3, 0.6, 0.95])
@pytest.mark.parametrize(("suffix", "options"), [
    (".wav", {}), (".aiff", {}), (".flac", {}), (".mp3", {}), (".ogg", {}),
    (".opus", {"format": "OGG", "subtype": "OPUS"}),
])  # fmt: skip
def test_truncated_files_are_refused(tmp_path, suffix, options, kept):
    path = tmp_path / f"cut{suffix}"
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 3 * RATE)
    soundfile.write(path, noise, RATE, **options)
    assert read_audio(path, sample_rate=RATE).shape[1] >= 3 * RATE
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(ValueError, match=f"cut{suffix}.*(truncated|can't be read)"):
        read_audio(path, sample_rate=RATE)


def _wav(frames: int) -> bytes:
    content = io.BytesIO()
    soundfile.write(content, np.zeros(frames), RATE, format="WAV")
    return content.getvalue()


@pytest.mark.parametrize(("content", "reason"), [
    (b"", "can't be read as sound: the file is empty"),
    (b"not a sound at all\n" * 100, "can't be read as sound: Format not recognised"),
    (_wav(100)[:30], "can't be read"),
    (_wav(0), "no samples"),
])  # fmt: skip
def test_what_is_no_sound_is_refused(tmp_path, content, reason):
    path = tmp_path / "a.wav"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path} .*{reason}"):
        read_audio(path, sample_rate=RATE)


def test_other_faults_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"missing\.wav is missing"):
        read_audio(tmp_path / "missing.wav", sample_rate=RATE)
    (tmp_path / "folder.wav").mkdir()
    with pytest.raises(ValueError, match=r"folder\.wav is a folder, not a file"):
        read_audio(tmp_path / "folder.wav", sample_rate=RATE)
    soundfile.write(tmp_path / "nan.wav", np.array([0.1, np.nan, 0.2]), RATE, subtype="FLOAT")
    with pytest.raises(ValueError, match=r"nan\.wav has values that are not finite"):
        read_audio(tmp_path / "nan.wav", sample_rate=RATE)


@pytest.mark.parametrize("length", [0xFFFFFFFF, 0x7FFFF000])
def test_wav_that_was_written_to_a_pipe_is_read(tmp_path, length):
    content = bytearray(_wav(100))
    content[40:44] = struct.pack("<I", length)
    (tmp_path / "piped.wav").write_bytes(content)
    assert read_audio(tmp_path / "piped.wav", sample_rate=RATE).shape == (1, 100)


def test_a_sound_under_another_suffix_is_read(tmp_path):
    (tmp_path / "a.ogg").write_bytes(_wav(100))
    assert read_audio(tmp_path / "a.ogg", sample_rate=RATE).shape == (1, 100)


def test_duration(tmp_path):
    soundfile.write(tmp_path / "a.flac", tone(440, 0.25, 44_100), 44_100)
    (tmp_path / "b.wav").write_text("nothing")
    assert duration(tmp_path / "a.flac") == 0.25
    assert duration(tmp_path / "b.wav") == 0


@pytest.mark.parametrize(
    ("suffix", "tolerance"), [(".wav", 2**-23), (".flac", 2**-23), (".ogg", 0.05), (".FLAC", 2**-23)]
)
def test_what_is_written_is_read(tmp_path, suffix, tolerance):
    audio = tone(440, 0.5, channels=2).T
    write_audio(tmp_path / f"a{suffix}", audio, RATE)
    again = read_audio(tmp_path / f"a{suffix}", sample_rate=RATE, channels=2)
    assert again.shape == audio.shape
    assert np.abs(again - audio).max() <= tolerance
    assert [path.name for path in tmp_path.iterdir()] == [f"a{suffix}"]


def test_overs_are_clipped_not_wrapped(tmp_path):
    write_audio(tmp_path / "a.wav", np.array([[1.5, -1.5, 0.25]], np.float32), RATE)
    np.testing.assert_allclose(read_audio(tmp_path / "a.wav", sample_rate=RATE), [[1, -1, 0.25]], atol=1e-6)


def test_minutes_of_vorbis_are_written():
    audio = np.random.default_rng(0).uniform(-0.1, 0.1, (1, 8000 * 400)).astype(np.float32)
    with soundfile.SoundFile(io.BytesIO(encode_audio(audio, 8000, suffix=".ogg"))) as file:
        assert file.frames == audio.shape[1]


def test_a_file_is_replaced_not_written_over(tmp_path):
    write_audio(tmp_path / "a.wav", tone(440, 0.1).T, RATE)
    (tmp_path / "same").hardlink_to(tmp_path / "a.wav")
    before = (tmp_path / "same").read_bytes()
    write_audio(tmp_path / "a.wav", tone(880, 0.1).T, RATE)
    assert (tmp_path / "same").read_bytes() == before != (tmp_path / "a.wav").read_bytes()


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.wav"
    write_audio(path, tone(440, 0.1).T, RATE)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="not finite"):
        write_audio(path, np.full((1, 10), np.nan, np.float32), RATE)
    with pytest.raises(ValueError, match=r"written as .wav, .flac, .ogg, not as '.xyz'"):
        write_audio(tmp_path / "a.xyz", tone(440, 0.1).T, RATE)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_recorded_sounds_are_read(tmp_path_factory):
    sounds = recorded_sounds(Path(tmp_path_factory.getbasetemp()))
    assert len(sounds) > 500
    for path in sounds[::17]:
        audio = read_audio(path, sample_rate=RATE)
        assert audio.shape == (1, pytest.approx(duration(path) * RATE, abs=1))
        assert 0 < np.abs(audio).max() < 1.5, path


@pytest.fixture
def small_files():
    """No file may grow beyond 50,000 bytes: writing more is an error, as it is on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg"])
def test_a_sound_that_the_disk_does_not_take_is_an_os_error_and_leaves_nothing(tmp_path, small_files, suffix):
    noise = np.random.default_rng(0).normal(size=(1, 10 * RATE)).astype(np.float32)
    with pytest.raises(OSError, match="File too large") as caught:
        write_blocks(tmp_path / f"a{suffix}", [noise], RATE, 1)
    assert caught.value.filename == str(tmp_path / f"a{suffix}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg"])
def test_a_mark_changes_no_sample_and_is_read_back(tmp_path, suffix):
    marked, plain = tmp_path / f"marked{suffix}", tmp_path / f"plain{suffix}"
    write_blocks(marked, [tone(1000, 0.1).T], RATE, 1, mark="spresso: seed=0")
    write_blocks(plain, [tone(1000, 0.1).T], RATE, 1)
    assert (sound_mark(marked), sound_mark(plain)) == ("spresso: seed=0", "")
    np.testing.assert_array_equal(soundfile.read(marked)[0], soundfile.read(plain)[0])
    write_audio(plain, tone(1000, 0.1).T, RATE, mark="another")
    assert sound_mark(plain) == "another"
    (tmp_path / "text.wav").write_text("no sound")
    assert sound_mark(tmp_path / "text.wav") == ""
