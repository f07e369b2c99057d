"""Injects a fault into a rank of a job: Python imports this module at startup if its folder is in PYTHONPATH.

SPRESSO_FAULT describes the fault as JSON: `what` happens, on which `rank`, `at` which position of the stream. The fault
creates the file `mark` when it strikes; with `once` it does not strike again while that file exists. `slow` delays each
step of a job's first start by `seconds`, and with `always` each step of every start.
"""

import importlib.abc
import importlib.util
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

FAULT = json.loads(os.environ.get("SPRESSO_FAULT", "{}"))


def strike() -> bool:
    """Return whether the fault strikes now, and create its mark if so."""
    mark = Path(FAULT["mark"])
    if FAULT.get("once") and mark.exists():
        return False
    mark.touch()
    return True


def in_feed(module):
    """Let the fault strike when a rank requests the batch at the position."""
    begin, next_ = module.Feed.begin, module.Feed.next

    def begun(feed, position):
        feed.fault_at = position
        begin(feed, position)

    def asked(feed):
        position, feed.fault_at = feed.fault_at, feed.fault_at + feed.stream.global_batch
        if FAULT["what"] == "slow" and ("SLURM_RESTART_COUNT" not in os.environ or FAULT.get("always")):
            time.sleep(FAULT["seconds"])
        if position == FAULT.get("at") and strike():
            if FAULT["what"] == "raise":
                raise ArithmeticError("this sample is one too many")
            if FAULT["what"] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if FAULT["what"] == "hang":
                time.sleep(10**6)
        return next_(feed)

    module.Feed.begin, module.Feed.next = begun, asked


def in_stream(module):
    """Let the fault strike when the reading thread reads the batch at the position."""
    read = module.LatentStream._read

    def stalled(stream, deal, out):
        if min(deal.positions) >= FAULT["at"] and strike():
            time.sleep(10**6)
        return read(stream, deal, out)

    module.LatentStream._read = stalled


def in_evaluation(module):
    """Delay each batch of the held-out evaluation by a second."""
    batches = module.HeldOutLoss._batches

    def slow(loss, device):
        for batch in batches(loss, device):
            strike()
            time.sleep(1)
            yield batch

    module.HeldOutLoss._batches = slow


def deadly_save(module):
    """Kill the rank when the save of the checkpoint at the position has begun, before its ranges are written."""
    write = module._write_files

    def killed(temporary, tensors, group):
        if module.folder_name(FAULT["at"]) in temporary.name and strike():
            os.kill(os.getpid(), signal.SIGKILL)
        return write(temporary, tensors, group)

    module._write_files = killed


def deadly_evaluation(module):
    """Kill the rank between two batches of a held-out evaluation that is not the first."""
    batches, begun = module.HeldOutLoss._batches, []

    def killed(loss, device):
        begun.append(True)
        for number, batch in enumerate(batches(loss, device)):
            if number == 1 and len(begun) > 1 and strike():
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch

    module.HeldOutLoss._batches = killed


PATCHES = {
    **dict.fromkeys(("raise", "kill", "hang", "slow"), ("trainer.feed", in_feed)),
    "stall": ("trainer.data.stream", in_stream),
    "slow_evaluation": ("trainer.log.held_out", in_evaluation),
    "kill_in_evaluation": ("trainer.log.held_out", deadly_evaluation),
    "kill_in_save": ("trainer.checkpoints.checkpoint", deadly_save),
}


class Patcher(importlib.abc.MetaPathFinder):
    """Patches a module right after Python has loaded it."""

    def __init__(self, name, patch):
        self.name, self.patch = name, patch

    def find_spec(self, name, path=None, target=None):
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def load_and_patch(module):
            load(module)
            self.patch(module)

        spec.loader.exec_module = load_and_patch
        return spec


def on_disk():
    """Let the folder for temporary files look full."""
    usage, folder = shutil.disk_usage, tempfile.gettempdir()
    full = type(usage(folder))(10**9, 10**9, 0)
    shutil.disk_usage = lambda path: full if str(path) == folder else usage(path)


if FAULT and str(FAULT.get("rank", 0)) == os.environ.get("SLURM_PROCID"):
    if FAULT["what"] == "full_temp":
        if "launch.slurm.node_health" in sys.orig_argv and strike():  # the batch script has a SLURM_PROCID, too
            on_disk()
    else:
        sys.meta_path.insert(0, Patcher(*PATCHES[FAULT["what"]]))
