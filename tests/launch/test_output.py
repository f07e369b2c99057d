"""Output whose reader goes away, and what then becomes of the work."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

WORK = """
import sys, time
from launch.output import reader_is_gone, survive_readers
survive_readers()
print("begun", flush=True)
time.sleep(1)
for number in range(5):
    print("x" * 10_000, flush=True)
    print("y", file=sys.stderr)
with open(sys.argv[1], "w") as file:
    file.write(f"done {reader_is_gone()}")
print("the end")
"""


def _start(path, **streams) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", WORK, str(path)], **streams)


def test_work_goes_on_without_a_reader_of_its_pipe(tmp_path):
    reader, writer = os.pipe()
    process = _start(tmp_path / "out", stdout=writer, stderr=writer)
    os.close(writer)
    assert os.read(reader, 6) == b"begun\n"
    os.close(reader)
    assert process.wait(60) == 0
    assert (tmp_path / "out").read_text() == "done True"


def test_work_goes_on_without_its_terminal(tmp_path):
    terminal, side = pty.openpty()
    process = _start(tmp_path / "out", stdin=subprocess.DEVNULL, stdout=side, stderr=side)
    os.close(side)
    assert os.read(terminal, 5) == b"begun"
    os.close(terminal)
    assert process.wait(60) == 0
    assert (tmp_path / "out").read_text() == "done True"


def test_a_file_never_takes_the_place_of_a_closed_output(tmp_path):
    command = f"exec '{sys.executable}' -c \"$1\" '{tmp_path / 'out'}' >&- 2>&-"
    assert subprocess.run(["bash", "-c", command, "bash", WORK], check=False).returncode == 0
    assert (tmp_path / "out").read_text() == "done False"


def test_all_that_is_printed_arrives(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", WORK, str(tmp_path / "out")], capture_output=True, text=True, check=True
    )
    assert done.stdout == "begun\n" + ("x" * 10_000 + "\n") * 5 + "the end\n"
    assert done.stderr == "y\n" * 5
