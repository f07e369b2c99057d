"""The demo, whole: what a codec that works must show on clips that no stage saw."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """Its run directory."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    command = [sys.executable, "-m", "launch.cli", "run", "demo", f"run_dir={folder}"]
    subprocess.run(command, cwd=ROOT, check=True)
    return folder


def log_mel(demo: Path, system: str) -> float:
    report = json.loads((demo / "evaluate/evaluation.json").read_text())
    return report["results"][system]["log_mel"]["mean"]


def test_z_is_followed(demo):
    """By a clear margin: the source's own z against another clip's, and against none."""
    assert log_mel(demo, "z") < 0.85 * log_mel(demo, "z_other")
    assert log_mel(demo, "z") < 0.85 * log_mel(demo, "unconditional")


@pytest.mark.parametrize("rate", ["zq15", "zq4"])
def test_quantized_z_lies_between(demo, rate):
    """No better than z and better than the floors; finetuning improves it.

    In so short a training z fills few of its dimensions: these rates cost hardly more than the noise of a figure.
    """
    assert log_mel(demo, "z") < log_mel(demo, f"{rate}_before") + 0.05
    assert log_mel(demo, rate) < log_mel(demo, f"{rate}_before")
    assert log_mel(demo, rate) < 0.9 * min(log_mel(demo, "z_other"), log_mel(demo, "unconditional"))


def test_more_bits_are_no_worse(demo):
    assert log_mel(demo, "zq15") < log_mel(demo, "zq4") + 0.05


def test_autoencoder_is_the_ceiling(demo):
    assert log_mel(demo, "autoencoder") < min(log_mel(demo, system) for system in ("z", "zq15"))


def test_bit_rates_are_those_of_the_files(demo):
    report = json.loads((demo / "evaluate/evaluation.json").read_text())
    rates = {system["key"]: system for system in report["systems"]}
    assert rates["zq15"]["payload_kbps"] == pytest.approx(4 / 3)
    for key in ("zq15", "zq4"):
        header_and_last_vector = (18 + 15) * 8 / 2.5 / 1000
        assert 0 < rates[key]["file_kbps"] - rates[key]["payload_kbps"] < header_and_last_vector


def test_memory_stays_under_four_gibibytes(demo):
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 4 * 2**20
