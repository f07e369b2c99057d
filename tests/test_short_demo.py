"""A shortened demo: training improves the codec. `test_demo` has the results that the full demo must reach."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHORT = (
    *("data.synth_hours=0.3", "parallel.threads=1", "log.samples_every=0"),
    *("pretrain.samples=2000", "autoencode.samples=4000", "finetune.samples=800"),
    *("evaluate.clips=16", "evaluate.page_clips=2", "evaluate.decodes=2"),
)


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("demo") / "run"
    subprocess.run(
        [sys.executable, "-m", "launch.cli", "run", "demo", f"run_dir={folder}", *SHORT], cwd=ROOT, check=True
    )
    return json.loads((folder / "evaluate/evaluation.json").read_text())


def mean(report: dict, system: str, figure: str) -> float:
    return report["results"][system][figure]["mean"]


@pytest.mark.parametrize(("figure", "share"), [("log_mel", 0.8), ("denoising", 0.96)])
def test_z_and_its_codes_are_followed(report, figure, share):
    for floor in ("z_other", "unconditional"):
        for system in ("z", "zq2", "zq1"):
            assert mean(report, system, figure) < share * mean(report, floor, figure)


def test_fewer_bits_say_less(report):
    for fewer in ("z", "zq2_before"):
        assert mean(report, fewer, "denoising") < mean(report, "zq1_before", "denoising")
        assert mean(report, fewer, "log_mel") < mean(report, "zq1_before", "log_mel")


def test_bit_rates_are_those_of_the_files(report):
    rates = {system["key"]: system for system in report["systems"]}
    assert rates["zq2"]["payload_kbps"] == pytest.approx(16 / 90)
    for key in ("zq2", "zq1"):
        header_and_last_vector = (18 + 2) * 8 / 2.5 / 1000
        assert 0 < rates[key]["file_kbps"] - rates[key]["payload_kbps"] < header_and_last_vector
