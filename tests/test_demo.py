"""The full demo: the results that a working codec must reach on clips that no stage trained on."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """Run the demo and return its run directory."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    command = [sys.executable, "-m", "launch.cli", "run", "demo", f"run_dir={folder}"]
    subprocess.run(command, cwd=ROOT, check=True)
    return folder


def of_clips(demo: Path, system: str, figure: str) -> np.ndarray:
    """Return a system's figure for each held-out clip."""
    report = json.loads((demo / "evaluate/evaluation.json").read_text())
    return np.array(report["results"][system][figure]["clips"])


def log_mel(demo: Path, system: str) -> float:
    return float(of_clips(demo, system, "log_mel").mean())


def clearly_better(demo: Path, one: str, other: str, figure: str = "denoising") -> bool:
    """Whether `one` is lower than `other` by more than three standard errors of the difference per clip."""
    gain = of_clips(demo, other, figure) - of_clips(demo, one, figure)
    return bool(gain.mean() > 3 * gain.std(ddof=1) / len(gain) ** 0.5)


def distance(demo: Path, system: str) -> float:
    """Return the Fréchet distance between the originals and a system's decodes."""
    return json.loads((demo / "evaluate/evaluation.json").read_text())["results"][system]["frechet"]["mean"]


def test_decodes_are_as_near_as_was_measured(demo):
    """The bounds of z and of 0.18 kbps are a fifth above what was measured: 3.0 and 4.3 dB."""
    assert log_mel(demo, "z") < 3.6
    assert log_mel(demo, "zq2") < 5.1


def test_z_is_followed(demo):
    """The source's own z is clearly better than another clip's z, and than no z."""
    assert log_mel(demo, "z") < 0.7 * log_mel(demo, "z_other")
    assert log_mel(demo, "z") < 0.7 * log_mel(demo, "unconditional")


@pytest.mark.parametrize("rate", ["zq2", "zq1"])
def test_quantized_z_lies_between(demo, rate):
    """Quantized z is worse than z and better than the floors, in log-mel distance and in D's denoising error.

    Before finetuning, D takes eight bits for the whole of z: its denoising error is then that of no z at all.
    """
    before = f"{rate}_before"
    assert log_mel(demo, "z") < log_mel(demo, before)
    assert clearly_better(demo, "z", before)
    for floor in ("z_other", "unconditional"):
        assert log_mel(demo, before) < 0.8 * log_mel(demo, floor)
        assert clearly_better(demo, rate, floor)
    assert clearly_better(demo, before, "z_other")


@pytest.mark.parametrize("rate", ["zq2", "zq1"])
def test_finetuning_improves_quantized_z(demo, rate):
    """Finetuning clearly lowers the denoising error that it minimises, and brings the set of decodes nearer.

    A finetuned D knows how little z_q says and varies its decodes more, so they lie a little farther from the one
    original that log-mel compares them with.
    """
    before = f"{rate}_before"
    assert clearly_better(demo, rate, before)
    assert distance(demo, rate) < distance(demo, before)
    assert log_mel(demo, rate) < log_mel(demo, before) + 0.3


def test_more_bits_are_better(demo):
    assert clearly_better(demo, "zq2_before", "zq1_before", "log_mel")
    assert clearly_better(demo, "zq2", "zq1", "log_mel")
    assert clearly_better(demo, "zq2", "zq1")


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
