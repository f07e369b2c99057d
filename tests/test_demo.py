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
    assert log_mel(demo, "z") < 0.7 * log_mel(demo, "z_other")
    assert log_mel(demo, "z") < 0.7 * log_mel(demo, "unconditional")


@pytest.mark.parametrize("rate", ["zq2", "zq1"])
def test_quantized_z_lies_between(demo, rate):
    """Worse than z and better than the floors; finetuning improves it.

    At 16 bits a z the quantizer costs less than the noise of a figure; at 8 bits it shows.
    """
    before = log_mel(demo, f"{rate}_before")
    assert log_mel(demo, "z") < before + (0.05 if rate == "zq2" else 0)
    assert before < 0.8 * min(log_mel(demo, "z_other"), log_mel(demo, "unconditional"))
    assert log_mel(demo, rate) < before


def test_more_bits_are_better(demo):
    assert log_mel(demo, "zq2_before") < log_mel(demo, "zq1_before")
    assert log_mel(demo, "zq2") < log_mel(demo, "zq1")


def test_autoencoder_is_the_ceiling(demo):
    assert log_mel(demo, "autoencoder") < min(log_mel(demo, system) for system in ("z", "zq2"))


def test_bit_rates_are_those_of_the_files(demo):
    report = json.loads((demo / "evaluate/evaluation.json").read_text())
    rates = {system["key"]: system for system in report["systems"]}
    assert rates["zq2"]["payload_kbps"] == pytest.approx(16 / 90)
    for key in ("zq2", "zq1"):
        header_and_last_vector = (18 + 2) * 8 / 2.5 / 1000
        assert 0 < rates[key]["file_kbps"] - rates[key]["payload_kbps"] < header_and_last_vector


def test_memory_stays_under_four_gibibytes(demo):
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 4 * 2**20
