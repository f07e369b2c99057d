"""A stage continues only what it is told to continue: the same formulation, and the export that is on record."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from launch.cli import main
from launch.status.stage_status import StageStatus
from trainer.exported import missing_export

OLD = Path(__file__).parents[1] / "golden/old_run"
END = "checkpoints/step_000000000064"


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """A finished run at the path in its own config, below the working directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(OLD, "runs/old")
    return Path("runs/old")


def refusal(capsys, *arguments: object) -> str:
    """Return the one line with which a command is refused."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def train(run: Path, stage: str, *overrides: str) -> tuple[object, ...]:
    """Return the command that trains a stage of the run anew, in the recipe with these overrides."""
    shutil.rmtree(run / stage)
    return ("train", run / "config.yaml", f"stage={stage}", *overrides)


@pytest.mark.parametrize(
    ("override", "mend"),
    [
        ("diffusion.name=edm", "set diffusion.name=flow_matching"),
        ("lora.alpha=2", "set lora.alpha=1.0"),
        ("lora.rank=2", "set lora.rank=1"),
        ("quantizer.beam=1", "set quantizer.beam="),
    ],
)
def test_finetune_refuses_a_codec_that_was_trained_otherwise(run, capsys, override, mend):
    line = refusal(capsys, *train(run, "finetune", override))
    assert "prior/export" in line
    assert mend in line
    assert not (run / "finetune/export").exists()


@pytest.mark.parametrize("source", ["export", END])
@pytest.mark.parametrize(
    ("override", "mend"), [("diffusion.name=edm", "set diffusion.name=flow_matching"), ("lora.alpha=2", "=1.0")]
)
def test_start_from_refuses_weights_that_mean_something_else(run, capsys, source, override, mend):
    start = f"checkpoint.start_from=runs/source/autoencode/{source}"
    shutil.copytree(run, "runs/source")
    if override.startswith("diffusion"):  # D itself says nothing, so that only the weights to start from are refused
        forget_formulation(run)
    line = refusal(capsys, *train(run, "autoencode", start, override))
    assert f"runs/source/autoencode/{source}" in line
    assert mend in line


def forget_formulation(run: Path) -> None:
    """Remove the diffusion's formulation from the header of D's weights, as in a release that does not say it."""
    from models.weights import load_weights, save_weights

    path = run / "pretrain/export/dit.safetensors"
    config, state = load_weights(path)
    config.pop("diffusion", None)
    save_weights(path, state, config)


def test_an_export_that_is_not_the_one_on_record_is_refused(run, capsys):
    shutil.rmtree(run / "prior/export")
    shutil.copytree(run / "finetune/export", run / "prior/export")
    line = refusal(capsys, *train(run, "finetune"))
    assert "runs/old/prior/export has the hash" in line
    assert "says that the stage exported" in line


def test_evaluate_refuses_an_export_that_is_not_the_one_on_record(run, capsys):
    shutil.rmtree(run / "quantize/export")
    shutil.copytree(run / "finetune/export", run / "quantize/export")
    assert "runs/old/quantize/export has the hash" in refusal(capsys, "evaluate", run / "config.yaml")


def test_a_stage_whose_export_is_gone_is_not_done_and_is_exported_again(run, capsys):
    shutil.rmtree(run / "finetune/export")
    status = json.loads((run / "finetune/status.json").read_text())
    assert "makes it from the last checkpoint" in missing_export(run / "finetune", status)
    assert StageStatus(run / "finetune", None).state == "no export"
    assert main(["status", str(run)]) == 0
    assert "runs/old/finetune/export is gone: run finetune again" in " ".join(capsys.readouterr().out.split())
    assert main(["train", str(run / "config.yaml"), "stage=finetune"]) == 0
    assert "it is made again from the last checkpoint" in capsys.readouterr().err
    assert json.loads((run / "finetune/status.json").read_text())["export"] == status["export"]
    assert "codec.json" in json.loads((run / "finetune/status.json").read_text())["files"]
    (run / "finetune/export/upsampler.safetensors").unlink()
    assert StageStatus(run / "finetune", None).state == "no export"


def test_without_a_checkpoint_a_lost_export_is_not_trained_anew_in_silence(run, capsys):
    shutil.rmtree(run / "finetune/export")
    shutil.rmtree(run / "finetune/checkpoints")
    line = refusal(capsys, "train", run / "config.yaml", "stage=finetune")
    assert "there is no checkpoint to make it from: put it back, or remove runs/old/finetune" in line


def test_a_stage_names_the_lost_export_that_it_builds_on(run, capsys):
    shutil.rmtree(run / "prior/export")
    line = refusal(capsys, *train(run, "finetune"))
    assert "the stage finetune builds on prior, but its export runs/old/prior/export is gone: run prior again" in line
