"""The section of `gpu.py` that writes what the later ones train on."""

from __future__ import annotations

import time
from collections.abc import Mapping

from gpu_cases import Case, Row, Setting
from gpu_training import write_set


def cases(setting: Setting) -> Mapping[str, Case]:
    """Return the one case."""

    def write(row: Row) -> None:
        begun, samples = time.perf_counter(), 16 if setting.small else 256
        write_set(setting, samples=samples)
        row("clips of noise", clips=samples, seconds=time.perf_counter() - begun)

    return {"clips of noise": write}
