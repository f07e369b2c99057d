"""A task that can't be forked trains by itself, and loses no signal that came before its training watches for them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import os, signal, sys, threading, time
from launch.slurm import supervisor
from launch.slurm.attempt import Attempt
from launch.slurm.deadline import Notice
from launch.slurm.slurm_task import SlurmTask
from pathlib import Path
from trainer.recipes.reading import load_recipe

def importing(names):
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()  # as packages do; it may take a signal
    os.kill(os.getpid(), signal.SIGUSR2)

def refuse():
    raise RuntimeError("a device is open")

supervisor._import_all, supervisor.forked.require_forkable = importing, refuse
attempt = Attempt(Path(sys.argv[1]) / "pretrain", "12", 0)
supervisor.supervise("pretrain", attempt, SlurmTask(0, 1, 0, (1,)), load_recipe("tiny", []))
os.kill(os.getpid(), signal.SIGTERM)
came = []

class Watched(Notice):
    def _handle_notice(self, number):
        came.append(number)

with Watched("12", grace=5, leave=None) as notice:
    assert not came
    signal.pthread_sigmask(signal.SIG_UNBLOCK, notice.signals)
    until = time.monotonic() + 10
    while len(came) < 2 and time.monotonic() < until:
        time.sleep(0.01)
print(sorted(came) == sorted([signal.SIGUSR2, signal.SIGTERM]), flush=True)
os._exit(0)
"""


def test_signals_wait_for_a_worker_that_is_not_forked(tmp_path):
    root = str(Path(__file__).parents[3])
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SPRESSO"))}
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, env=environment | {"PYTHONPATH": root}
    )
    assert (ended.returncode, ended.stdout) == (0, "True\n"), ended.stderr
    assert "rank 0 can't be restarted in the job: a device is open" in ended.stderr
