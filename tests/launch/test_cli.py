"""The command: what it prints, what it refuses, and that it goes on."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from launch.cli import main
from models.weights import load_weights, save_weights
from trainer.stages import trained_stages

pytestmark = pytest.mark.alone

ROOT = Path(__file__).parents[2]
QUICK = ("parallel.threads=1", "parallel.device=cpu", "data.workers=1")


def spresso(*arguments: object, cwd: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "launch.cli", *map(str, arguments)]
    return subprocess.Popen(command, cwd=cwd, env=environment, text=True, stdout=-1, stderr=-1)


def refused(capsys, *arguments: object) -> str:
    """The one clear line of a mistake."""
    assert main([str(argument) for argument in arguments]) == 2
    output = capsys.readouterr()
    lines = output.err.strip().splitlines()
    assert "Traceback" not in output.err
    assert lines[-1].startswith("spresso: ")
    return lines[-1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder in which the tiny recipe was run, killed twice on its way."""
    folder = tmp_path_factory.mktemp("trained")
    for stage in ("pretrain", "finetune"):
        process = spresso("run", "tiny", *QUICK, cwd=folder)
        wait_for(folder / f"runs/tiny/{stage}/checkpoints", process)
        process.kill()
        process.communicate()
    process = spresso("run", "tiny", *QUICK, cwd=folder)
    output, log = process.communicate(timeout=300)
    assert process.returncode == 0, log
    (folder / "log.txt").write_text(log)
    (folder / "output.txt").write_text(output)
    return folder


def wait_for(checkpoints: Path, process: subprocess.Popen[str]) -> None:
    """Until the first checkpoint is whole."""
    for _ in range(3000):
        if any(checkpoints.glob("step_*/manifest.json")):
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise AssertionError(f"no checkpoint appeared in {checkpoints}")


def test_help_needs_nothing_heavy():
    heavy = "{'torch', 'omegaconf', 'numpy'} & set(sys.modules)"
    code = f"import sys, launch.cli; launch.cli.parser(); sys.exit(bool({heavy}))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_settings_with_dashes_and_a_missing_recipe_name_the_mend(capsys):
    for words, told in (
        (["run", "tiny", "--log.every=8"], "settings of a recipe are written without dashes, such as log.every=8"),
        (["run"], "the following arguments are required: recipe\n"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(words)
        assert told in capsys.readouterr().err


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    for command in (
        "synth",
        "prepare",
        "train",
        "run",
        "encode",
        "decode",
        "info",
        "evaluate",
        "page",
        "plan",
        "weights",
        "push",
    ):
        assert re.search(rf"^ +{command} +\S", text, re.MULTILINE)


def test_a_killed_run_goes_on_and_does_nothing_twice(trained):
    log = (trained / "log.txt").read_text()
    for stage in ("pretrain", "autoencode", "quantize"):
        assert f"done before: runs/tiny/{stage}/export" in log
    assert re.search(r"finetune: resumed from \S+/step_", log)
    assert "open " in log
    assert "Continuous z" in (trained / "output.txt").read_text()
    for stage in set(trained_stages()) - {"prior"}:
        assert not list((trained / "runs/tiny" / stage / "checkpoints").glob(".*"))


def test_run_again_does_nothing(trained):
    before = {path: path.stat().st_mtime_ns for path in (trained / "runs").rglob("*.safetensors")}
    process = spresso("run", "tiny", *QUICK, cwd=trained)
    _, log = process.communicate(timeout=100)
    assert process.returncode == 0
    assert log.count("done before") == 4
    assert {path: path.stat().st_mtime_ns for path in (trained / "runs").rglob("*.safetensors")} == before


def test_a_signal_saves_and_the_same_command_goes_on(trained, tmp_path):
    shared = [f"data.latents={trained / 'runs/tiny/latents'}", f"data.audio={trained / 'runs/tiny/audio'}"]
    command = ("train", "tiny", "stage=pretrain", *QUICK, *shared, "pretrain.samples=100000", "checkpoint.every=64")
    process = spresso(*command, cwd=tmp_path)
    wait_for(tmp_path / "runs/tiny/pretrain/checkpoints", process)
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=60)
    assert process.returncode == 75, log
    assert "stopped and saved" in log
    status = (tmp_path / "runs/tiny/pretrain/status.json").read_text()
    samples = int(re.search(r'"samples": (\d+)', status)[1])
    assert (tmp_path / f"runs/tiny/pretrain/checkpoints/step_{samples:012d}").is_dir()


def test_a_rank_that_is_killed_takes_the_others_along_and_is_named(trained, tmp_path):
    shared = [f"data.latents={trained / 'runs/tiny/latents'}", f"data.audio={trained / 'runs/tiny/audio'}"]
    command = ("train", "tiny", "stage=pretrain", *QUICK, *shared, "pretrain.samples=100000", "checkpoint.every=64")
    process = spresso(*command, "parallel.processes=2", cwd=tmp_path)
    wait_for(tmp_path / "runs/tiny/pretrain/checkpoints", process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, log = process.communicate(timeout=60)
    assert process.returncode == 1, log
    assert re.search(
        r"spresso: rank \d was killed by SIGKILL, so the other ranks were ended; see \S+/logs/rank_\d\.log", log
    )


def test_encode_and_decode_files(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    stereo = np.random.default_rng(0).normal(size=(33_000, 2)) * 0.1
    soundfile.write("in.wav", stereo, 22_050, subtype="PCM_24")
    assert main(["encode", "in.wav", "out.spr", "--device", "cpu"]) == 0
    assert main(["decode", "out.spr", "back.wav", "--seed", "5", "--steps", "2", "--device", "cpu"]) == 0
    assert main(["decode", "out.spr", "many.flac", "--samples", "2", "--device", "cpu"]) == 0
    assert main(["info", "out.spr"]) == 0
    first, rate = soundfile.read("back.wav")
    assert (rate, first.shape) == (22_050, (33_000, 2))
    assert not np.array_equal(soundfile.read("many.0.flac")[0], soundfile.read("many.1.flac")[0])
    assert main(["decode", "out.spr", "again.wav", "--seed", "5", "--steps", "2", "--device", "cpu"]) == 0
    assert Path("again.wav").read_bytes() == Path("back.wav").read_bytes()
    told = capsys.readouterr()
    assert "runs/tiny/finetune/export" in told.err
    assert "as mid and side" in told.out


def test_streams_that_cannot_be_decoded(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    soundfile.write("in.wav", np.zeros(48_000) + 0.01, 48_000)
    assert main(["encode", "in.wav", "whole.spr"]) == 0
    content = Path("whole.spr").read_bytes()
    (tmp_path / "cut.spr").write_bytes(content[:-3])
    assert "cut short" in refused(capsys, "decode", tmp_path / "cut.spr", "x.wav")
    (tmp_path / "foreign.spr").write_bytes(b"RIFF" + content)
    assert "not an .spr file" in refused(capsys, "decode", tmp_path / "foreign.spr", "x.wav")
    (tmp_path / "other.spr").write_bytes(content[:4] + b"\xde\xad\xbe\xef" + content[8:])
    assert "model deadbeef" in refused(capsys, "decode", tmp_path / "other.spr", "x.wav")
    codec = "runs/tiny/finetune/export"
    assert "model deadbeef" in refused(capsys, "decode", tmp_path / "other.spr", "x.wav", "--codec", codec)
    assert "nothing.spr" in refused(capsys, "decode", "nothing.spr", "x.wav")
    assert "books" in refused(capsys, "encode", "in.wav", "x.spr", "--books", 99)
    assert not Path("x.wav").exists()


def test_settings_may_follow_an_option_and_nothing_else_may(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["run", "tiny", "--dry-run", "name=x", "cluster=slurm", "pretrain.samples=-3"]) == 2
    assert "pretrain.samples=-3" in capsys.readouterr().err
    for wrong in (["run", "tiny", "--dry-run", "x"], ["run", "tiny", "--dri=1"], ["info", "a.spr", "name=x"]):
        with pytest.raises(SystemExit):
            main(wrong)
        assert "unrecognized arguments: " in capsys.readouterr().err


def test_a_folder_without_sound(tmp_path, capsys):
    (tmp_path / "readme.txt").write_text("no sound here")
    line = refused(capsys, "run", "tiny", f"data.audio={tmp_path}", f"run_dir={tmp_path / 'run'}")
    assert str(tmp_path) in line
    assert "wav" in line


@pytest.mark.parametrize(
    ("overrides", "mend"),
    [
        (["autoencode.lrr=1"], "autoencode.lr"),
        (["latent_encoder.pooling=8"], "latent_encoder.pooling=8"),
        (["dit.width=50"], "multiple of"),
        (["nonsense"], "key=value"),
        (["data.audio=/nowhere"], "/nowhere"),
    ],
)
def test_settings_that_cannot_be(overrides, mend, capsys, tmp_path):
    assert mend in refused(capsys, "run", "tiny", f"run_dir={tmp_path}", *overrides)


def test_an_unknown_recipe_and_an_unknown_stage(capsys):
    assert "demo" in refused(capsys, "run", "nosuch")
    assert "stage=pretrain|autoencode" in refused(capsys, "train", "tiny", "stage=dance")


def test_a_run_directory_of_another_config(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    line = refused(capsys, "run", "tiny", *QUICK, "autoencode.lr=0.5")
    assert "autoencode.lr" in line
    assert "run_dir" in line
    assert "lr: 0.5" not in (trained / "runs/tiny/config.yaml").read_text()


def test_latents_of_another_run_are_shared_wherever_they_are_named_from(trained, tmp_path):
    process = spresso("run", "tiny", *QUICK, "name=second", "data.latents=runs/tiny/latents", cwd=trained)
    wait_for(trained / "runs/second/pretrain/checkpoints", process)
    process.send_signal(signal.SIGINT)
    _, log = process.communicate(timeout=60)
    assert "made before: runs/tiny/latents" in log
    assert process.returncode == 75, log
    assert not (trained / "runs/second/audio").exists()
    absolute = (f"run_dir={trained / 'runs/second'}", f"data.latents={trained / 'runs/tiny/latents'}")
    process = spresso("train", "tiny", "stage=pretrain", *QUICK, "name=second", *absolute, cwd=tmp_path)
    _, log = process.communicate(timeout=100)
    assert process.returncode == 0, log


def test_latents_of_another_autoencoder_are_refused(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("models.magnitude_autoencoder.MagnitudeAE.identity", lambda _: "0123456789")
    paths = (f"run_dir={tmp_path}", f"data.latents={trained / 'runs/tiny/latents'}")
    assert "made by another autoencoder" in refused(capsys, "train", "tiny", "stage=pretrain", *QUICK, *paths)


def test_a_pretrained_model_is_known_by_its_content_and_its_formulation(trained, tmp_path, capsys):
    folder = shutil.copytree(trained / "runs/tiny/pretrain/export", tmp_path / "pretrained")
    paths = (
        f"run_dir={tmp_path / 'run'}",
        f"data.latents={trained / 'runs/tiny/latents'}",
        f"pretrained.folder={folder}",
    )
    command = ("train", "tiny", "stage=autoencode", *QUICK, *paths)
    line = refused(capsys, *command, "diffusion.name=edm")
    assert "was trained as FlowMatching" in line
    assert "diffusion.name=flow_matching" in line
    assert main([*command, "autoencode.samples=32"]) == 0
    config, state = load_weights(folder / "dit.safetensors")
    save_weights(folder / "dit.safetensors", {name: value + 1 for name, value in state.items()}, config)
    capsys.readouterr()
    assert "input pretrained" in refused(capsys, *command, "autoencode.samples=64")


def test_figures_of_a_stage_that_was_trained_on_an_older_one_are_refused(trained, tmp_path, capsys):
    run = shutil.copytree(trained / "runs/tiny", tmp_path / "run")
    paths = (*QUICK, f"run_dir={run}")
    assert main(["evaluate", "tiny", *paths]) == 0
    assert main(["train", "tiny", "stage=autoencode", *paths, "autoencode.samples=160"]) == 0
    capsys.readouterr()
    assert "autoencode" in refused(capsys, "evaluate", "tiny", *paths, "autoencode.samples=160")


def test_a_stage_too_early_names_the_one_before(tiny, prepared, tmp_path, capsys):
    paths = [f"run_dir={tmp_path}", f"data.latents={prepared / 'latents'}", f"data.audio={prepared / 'audio'}"]
    assert "builds on quantize" in refused(capsys, "train", "tiny", "stage=finetune", *paths)
    assert "builds on autoencode" in refused(capsys, "evaluate", "tiny", *paths)
    assert "spresso prepare" in refused(capsys, "train", "tiny", "stage=pretrain", f"run_dir={tmp_path / 'empty'}")


def test_no_space_on_the_disk(prepared, tmp_path, monkeypatch, capsys):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "step_000000000032")

    monkeypatch.setattr("trainer.checkpoints.checkpoint._write", full)
    paths = [f"run_dir={tmp_path}", f"data.latents={prepared / 'latents'}", f"data.audio={prepared / 'audio'}"]
    assert "o space left" in refused(capsys, "train", "tiny", "stage=pretrain", *QUICK, *paths)
    assert not list((tmp_path / "pretrain/checkpoints").glob("*"))


def test_plan_works_where_pretrained_weights_are_not(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "spresso_11hz"]) == 0
    text = capsys.readouterr().out
    assert "autoencode: 3000000 samples" in text
    assert re.search(r"# memory: autoencode\nleft out.*checkpoints/Woosh-Flow", text)


def test_plan_shows_the_arithmetic_and_starts_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "demo", "parallel.processes=2", "parallel.micro_batch=2"]) == 0
    text = capsys.readouterr().out
    assert "2 rank(s) × 2 clips × 2 accumulated" in text
    assert "2 codebook(s) of 256: 16 bits per z, 0.1778 kbps" in text
    assert "autoencode:" in text
    for stage in ("pretrain", "autoencode", "finetune"):
        table = text.split(f"# memory: {stage}\n")[1].split("# memory")[0]
        assert re.search(r"^> +ddp( +[\d.]+){9} +fits$", table, re.MULTILINE)
        assert "the fastest that fits" in table
    assert max(map(len, text.split("# memory", 1)[1].splitlines())) <= 120
    assert not any(tmp_path.iterdir())


def test_exit_handlers_are_left_out_where_a_tracker_hangs(monkeypatch):
    from launch import cli
    from trainer.log.trackers import background

    monkeypatch.setattr(background, "_abandoned", [])
    assert not cli._hangs()
    background._abandoned.append("mlflow")
    assert cli._hangs()
