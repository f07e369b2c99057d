"""One bad file of a folder never stops the others and never passes as good; a full disk stops them all."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import soundfile

from launch.file_encoder import FileEncoder
from tests.launch.codecs import content, sound, spresso


@pytest.fixture
def failing(tmp_path, monkeypatch):
    """Makes the encoding of in/b.wav, the second of three sounds, raise an error."""
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    for name in "abc":
        soundfile.write(f"in/{name}.wav", sound(0.1), 48_000)

    def fail(error: BaseException | None) -> None:
        def call(self, source, *arguments):
            if error is not None and source.name == "b.wav":
                raise error
            encode(self, source, *arguments)

        monkeypatch.setattr(FileEncoder, "__call__", call)

    encode = FileEncoder.__call__
    return fail


def report() -> dict:
    return json.loads(Path("out/encode.report.json").read_text())


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("in/b.wav is odd"), "in/b.wav is odd"),
        (PermissionError(errno.EACCES, "Permission denied", "in/b.wav"), "in/b.wav can't be opened: permission denied"),
        (MemoryError(), "in/b.wav: MemoryError: "),
        (RuntimeError("out of memory\nand a trace"), "in/b.wav: RuntimeError: out of memory"),
    ],
)
def test_a_failed_file_is_named_and_in_the_report(codec, failing, capsys, error, reason):
    failing(error)
    assert spresso("encode", "in", "out", "--codec", codec) == 1
    told = capsys.readouterr().err
    assert f"spresso: {reason}\n" in told
    assert "2 done, 0 already there, 1 failed; out/encode.report.json names the failed files" in told
    assert set(content(Path("out"))) == {"a.wav.spr", "c.wav.spr"}
    found = report()
    assert (found["files"], found["done"], found["already_there"], found["failed"]) == (3, 2, 0, 1)
    assert found["finished"]
    assert [problem["file"] for problem in found["problems"]] == ["in/b.wav"]


@pytest.mark.parametrize(
    ("error", "status"),
    [(OSError(errno.ENOSPC, "No space left on device", "out/b.wav.spr"), 2), (KeyboardInterrupt(), 130)],
)
def test_a_full_disk_or_ctrl_c_ends_the_command_and_the_report_says_so(codec, failing, capsys, error, status):
    failing(error)
    assert spresso("encode", "in", "out", "--codec", codec) == status
    assert set(content(Path("out"))) == {"a.wav.spr"}
    found = report()
    assert (found["done"], found["finished"]) == (1, False)


def test_a_repaired_folder_leaves_a_report_without_problems(codec, failing):
    failing(ValueError("odd"))
    assert spresso("encode", "in", "out", "--codec", codec) == 1
    failing(None)
    assert spresso("encode", "in", "out", "--codec", codec) == 0
    found = report()
    assert (found["done"], found["already_there"], found["problems"]) == (1, 2, [])
