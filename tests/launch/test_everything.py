"""`prepare` and `encode` of a folder of everything that has ever gone wrong, killed twice on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.launch.codecs import content, export_codec
from tests.trainer.data.test_sound_reader import NOISE, RATE, encoded, flac, wav, without_end_mark

ROOT = Path(__file__).parents[2]
VORBIS = {"format": "OGG", "subtype": "VORBIS"}
USED = {
    "stream.flac": flac(0, md5=False),
    "absurd.flac": flac(2**36 - 1),
    "joined.ogg": encoded(**VORBIS) * 2,
    "joined.mp3": encoded(format="MP3") * 2,
    "live.ogg": without_end_mark(encoded(**VORBIS)),
    "unfinished.wav": wav(60_000, 0) + encoded(format="WAV")[44:],
    "integers.wav": encoded(NOISE * 32_768, format="WAV", subtype="FLOAT"),
    "left.wav": encoded(np.concatenate([NOISE, 0 * NOISE], axis=1), format="WAV"),
    "phone.wav": encoded(format="WAV", subtype="GSM610"),
    "old.caf": encoded(format="CAF"),
    "caf\udce9.wav": encoded(format="WAV"),
    "x" * 245 + ".wav": encoded(format="WAV"),
    "प्रति_दिन.wav": encoded(format="WAV"),
    "Pack #2/a.wav": encoded(NOISE[::-1], format="WAV"),
} | {
    f"plain{letter}.wav": encoded(np.roll(NOISE, number * 999), format="WAV") for number, letter in enumerate("abcdef")
}
BAD = {
    "cut.flac": flac(57_600)[:40_000],
    "cut.wav": encoded(format="WAV")[:50_000],
    "empty.wav": b"",
    "text.wav": b"this is no sound",
    "m4a.m4a": b"\0\0\0 ftypM4A " + bytes(1000),
    "silent.wav": encoded(0 * NOISE, format="WAV"),
    "nan.wav": encoded(NOISE * np.nan, format="WAV", subtype="FLOAT"),
}
STREAMS_OF_SILENCE = 1  # silence is no sound to learn from, but it can be encoded


@pytest.fixture(scope="module")
def sounds(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("everything") / "sounds"
    for name, data in (USED | BAD).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    phase = np.concatenate([NOISE, -NOISE], axis=1)
    soundfile.write(folder / "phase.wav", phase, RATE, subtype="FLOAT")
    (folder / "loop").symlink_to(folder)
    (folder / "broken.wav").symlink_to("nowhere.wav")
    (folder / "folder.wav").mkdir()
    os.mkfifo(folder / "pipe.wav")
    return folder


def killed_twice(arguments: list[str], done: Callable[[], int], at: tuple[int, int], folder: Path) -> int:
    """Run a command that is killed, with its workers, once `done()` has reached either number; return its status."""
    command = [sys.executable, "-m", "launch.cli", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for number in (*at, None):
        process = subprocess.Popen(
            command, cwd=folder, env=environment, start_new_session=True, stdout=subprocess.DEVNULL
        )
        while process.poll() is None:
            if number is not None and done() >= number:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            time.sleep(0.005)
        if number is None:
            return process.returncode
        assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"
    raise AssertionError


def test_prepare(sounds, tmp_path):
    arguments = ["prepare", "tiny", f"data.audio={sounds}", "data.workers=2", "data.holdout=0.4", "data.shard_mb=0.2"]
    work = tmp_path / "killed/latents/.prepare"
    status = killed_twice(
        [*arguments, f"run_dir={tmp_path / 'killed'}"], lambda: len(list(work.glob("t*-?????.json"))), (1, 3), tmp_path
    )
    assert status == 0
    assert killed_twice([*arguments, f"run_dir={tmp_path / 'whole'}"], lambda: 0, (), tmp_path) == 0
    outcome = content(tmp_path / "whole/latents")
    assert content(tmp_path / "killed/latents") == outcome
    report = json.loads((tmp_path / "whole/latents/report.json").read_text())
    reasons = {problem["file"]: problem["reason"] for problem in report["problems"]}
    assert {*BAD, "phase.wav"} <= {*reasons}
    assert reasons["phase.wav"].endswith("(opposite phase)")
    assert reasons["integers.wav"].endswith("divided by 32768")
    assert sum(report["clips"].values()) >= len(USED)


def test_encode(sounds, tmp_path):
    codec = export_codec(tmp_path)
    arguments = [str(sounds), "--codec", str(codec)]
    streams = tmp_path / "killed"
    found = lambda: len(list(streams.rglob("*.spr")))  # noqa: E731
    assert killed_twice(["encode", *arguments[:1], str(streams), *arguments[1:]], found, (4, 12), tmp_path) == 1
    assert killed_twice(["encode", *arguments[:1], "whole", *arguments[1:]], lambda: 0, (), tmp_path) == 1
    whole = content(tmp_path / "whole")
    assert content(streams) == whole
    failed = json.loads((tmp_path / "whole/encode.report.json").read_text())
    assert len(whole) == len(USED) + STREAMS_OF_SILENCE + 1  # and phase.wav, as stereo
    assert failed["finished"]
