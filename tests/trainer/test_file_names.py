"""Text that is printed: nothing in it moves a terminal's cursor, changes its title or turns a line around."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from launch.pipeline import say
from launch.status import logs
from trainer.file_names import printable, printable_lines
from trainer.formatting import aligned, in_markdown
from trainer.log.log_file import logging_to


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred", r"\x1b[31mred"),
        ("\x1b]8;;https://a.b\x07link", r"\x1b]8;;https://a.b\x07link"),
        ("\x9b2J", r"\x9b2J"),
        ("\x9d0;title\x9c", r"\x9d0;title\x9c"),
        ("a\rb\bc\x7f", r"a\x0db\x08c\x7f"),
        ("\u202etxt.exe\u202c", r"\u202etxt.exe\u202c"),
        ("\u2066a\u2069\u200f\u200e\u061c", r"\u2066a\u2069\u200f\u200e\u061c"),
        ("пёс 🐕 é", "пёс 🐕 é"),
    ],
)
def test_control_characters_become_visible(text: str, shown: str):
    assert printable(text) == printable_lines(text) == shown
    assert aligned([[text, "1"]]) == f"{shown}  1"


def test_lines_and_tabs_stay_in_longer_text():
    assert printable_lines("a\tb\n\x1b[1mc\r\n") == "a\tb\n\\x1b[1mc\\x0d\n"
    assert printable("a\tb\n") == r"a\x09b\x0a"


def test_markdown_is_one_line():
    assert in_markdown("a\n# b\n\n* c") == r"a \# b \* c"


def test_messages_and_logs_are_printed_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    say("found \x1b]0;x\x07.wav")
    with logging_to(tmp_path / "rank_0.log", show=True):
        logging.getLogger("trainer.test").warning("%s is damaged", "a\x1b[2J\u202e.wav")
    shown = [r"found \x1b]0;x\x07.wav", r"a\x1b[2J\u202e.wav is damaged"]
    assert capsys.readouterr().err.splitlines() == shown
    assert (tmp_path / "rank_0.log").read_text().endswith(f" WARNING {shown[1]}\n")


def test_logs_of_others_are_shown_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "autoencode" / "logs"
    folder.mkdir(parents=True)
    (folder / "rank_0.log").write_bytes(b"one\ttwo \x1b[2J\x1b]52;c;eA==\x07\xc2\x9b1m\nnext\n")
    logs.logs(tmp_path, stage=None, rank=None, follow=False)
    lines = capsys.readouterr().out.split("\n")
    assert lines[1:] == ["one\ttwo " + r"\x1b[2J\x1b]52;c;eA==\x07\x9b1m", "next", ""]
