"""What a run goes on from, what it begins with, and what it says of that."""

from __future__ import annotations

import dataclasses
import os
import pickle
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from launch import pipeline
from launch.cli import main
from models.codec import SPresso
from models.weights import load_weights, save_weights
from tests.trainer.test_loop import PRETRAIN, losses, stop_after, tensors
from trainer.checkpoints import checkpoint
from trainer.loop import train
from trainer.recipes.reading import load_recipe
from trainer.tasks import make_task

KEPT = (*PRETRAIN, "checkpoint.keep_last=9")


def steps_in(run: Path, stage: str = "pretrain") -> list[int]:
    return [checkpoint.samples_of(path) for path in checkpoint.checkpoints(run / stage / "checkpoints")]


@pytest.fixture(scope="module")
def whole(prepared, tmp_path_factory) -> Path:
    """The run directory of a pretrain and an autoencode stage that nothing interrupted."""
    run_dir = tmp_path_factory.mktemp("whole")
    paths = [f"run_dir={run_dir}", f"data.latents={prepared / 'latents'}", f"data.audio={prepared / 'audio'}"]
    config = load_recipe("tiny", [*paths, "parallel.threads=1", "parallel.device=cpu", *KEPT, "autoencode.samples=32"])
    assert train(config, "pretrain") == "done"
    assert train(config, "autoencode") == "done"
    return run_dir


@pytest.fixture
def copied(whole, tmp_path) -> Path:
    """A copy of it."""
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def test_never_refuses_an_older_run(copied, tiny):
    with pytest.raises(ValueError, match=r"holds a run at 96 samples.*resume=never: take another run_dir"):
        train(tiny(*KEPT, "checkpoint.resume=never"), "pretrain")
    assert steps_in(copied) == [32, 64, 96]


def test_never_begins_a_new_run(whole, tiny, tmp_path):
    assert train(tiny(*KEPT, "checkpoint.resume=never"), "pretrain") == "done"
    assert losses(tmp_path / "run") == losses(whole)


def test_an_older_checkpoint_is_followed_once(copied, whole, tiny, tmp_path):
    path = copied / "pretrain/checkpoints/step_000000000032"
    config = tiny(*KEPT, f"checkpoint.resume={path}")
    assert train(config, "pretrain", stop=stop_after(2)) == "stopped"
    assert steps_in(copied) == [32, 48]
    assert len(list((copied / "pretrain/checkpoints").glob("left_step_*"))) == 2
    assert train(config, "pretrain") == "done"  # from 48, not from 32 again
    assert "resumed from" in (log := (copied / "pretrain/logs/rank_0.log").read_text())
    assert "at 48 samples" in log
    assert losses(copied) == losses(whole)


def test_only_newer_checkpoints_are_left_behind(copied, tiny, tmp_path):
    """The path leads there by a detour, as the same place often has several names on a cluster."""
    (tmp_path / "link").symlink_to(copied)
    path = tmp_path / "link/autoencode/../pretrain/checkpoints/step_000000000064"
    assert train(tiny(*KEPT, f"checkpoint.resume={path}"), "pretrain") == "done"
    assert steps_in(copied) == [32, 64, 96]
    [left] = (copied / "pretrain/checkpoints").glob("left_step_*")
    assert left.name.startswith("left_step_000000000096_")
    # what was left behind may be followed too
    assert train(tiny(*KEPT, f"checkpoint.resume={left}"), "pretrain") == "done"
    assert steps_in(copied) == [96]


def test_a_stage_that_has_ended_still_follows(copied, tiny):
    with pytest.raises(ValueError, match="resume=never"):
        pipeline.train(tiny(*KEPT, "checkpoint.resume=never"), "pretrain")
    path = copied / "pretrain/checkpoints/step_000000000032"
    config = tiny(*KEPT, f"checkpoint.resume={path}")
    assert pipeline.train(config, "pretrain") == "done"
    log = copied / "pretrain/logs/rank_0.log"
    assert log.read_text().count("resumed from") == 1
    assert pipeline.train(config, "pretrain") == "done"  # done before, and followed before
    assert log.read_text().count("resumed from") == 1


def test_another_runs_checkpoint_of_the_same_config(whole, tiny, tmp_path):
    path = whole / "pretrain/checkpoints/step_000000000064"
    assert train(tiny(*KEPT, f"checkpoint.resume={path}"), "pretrain") == "done"
    assert steps_in(tmp_path / "run") == [64, 96]  # the other's is this run's own from here on
    assert min(losses(tmp_path / "run")) == 72
    ours, theirs = (tensors(run / "pretrain/checkpoints/step_000000000096") for run in (tmp_path / "run", whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_checkpoint_that_does_not_belong_is_refused(whole, tiny, tmp_path):
    path = whole / "pretrain/checkpoints/step_000000000064"
    cases = {
        r"trained with other settings.*start_from": tiny(*KEPT, "pretrain.lr=1e-3", f"checkpoint.resume={path}"),
        r"is a checkpoint of autoencode, not of pretrain": tiny(
            *KEPT, f"checkpoint.resume={whole / 'autoencode/checkpoints/step_000000000032'}"
        ),
        r"not a checkpoint": tiny(*KEPT, f"checkpoint.resume={tmp_path / 'nowhere'}"),
    }
    for told, config in cases.items():
        with pytest.raises(ValueError, match=told):
            train(config, "pretrain")
    broken = tmp_path / "broken"
    shutil.copytree(path, broken)
    (broken / "rank_00000.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="has 0 bytes"):
        train(tiny(*KEPT, f"checkpoint.resume={broken}"), "pretrain")
    assert not steps_in(tmp_path / "run")


def test_run_of_all_stages_refuses_what_is_one_stages(tiny):
    with pytest.raises(ValueError, match="applies to one stage: use `spresso train"):
        pipeline.run(tiny("checkpoint.start_from=somewhere"))


@pytest.mark.parametrize("setting", ["resume", "start_from"])
def test_so_does_run_on_a_cluster(setting, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["run", "tiny", "cluster=slurm", "--dry-run", f"checkpoint.{setting}=somewhere"]) == 2
    assert "applies to one stage: use `spresso train" in capsys.readouterr().err


@pytest.mark.parametrize("command", [("run", "tiny"), ("train", "tiny", "stage=pretrain")])
def test_a_dry_run_trains_nothing(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*command, "--dry-run"]) == 2
    assert "`spresso plan tiny`" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("setting", ["autoencode.lr=0.01", "seed=3"])
def test_checkpoints_without_a_config_resume_with_their_own_settings_alone(copied, tiny, setting):
    (copied / "autoencode/config.yaml").unlink()
    before = steps_in(copied, "autoencode")
    with pytest.raises(ValueError, match=r"trained with other settings or data, and .* has lost its config\.yaml"):
        train(tiny(*KEPT, "autoencode.samples=48", setting), "autoencode")
    assert steps_in(copied, "autoencode") == before
    assert not (copied / "autoencode/config.yaml").exists()
    train(tiny(*KEPT, "autoencode.samples=48"), "autoencode")


def test_it_says_what_it_restored(copied, tiny):
    train(tiny(*KEPT, "autoencode.samples=48"), "autoencode")
    log = (copied / "autoencode/logs/rank_0.log").read_text()
    table = log[log.index("resumed from") :]
    assert "step_000000000032 at 32 samples, 4 steps; written by ddp on 1 rank, now ddp on 1 rank" in table
    for part in ("D, LoRA", "g", "f"):
        assert f"\n  {part} " in table
    assert "param, ema, exp_avg, exp_avg_sq" in table
    assert "the frozen base is not in it: " in table


def test_a_base_of_another_hash_is_refused(copied, tiny):
    """The export that autoencode stands on is exchanged: it is no longer the one on record."""
    file = copied / "pretrain/export/dit.safetensors"
    config, state = load_weights(file)
    state["output.bias"] += 1
    save_weights(file, state, config)
    with pytest.raises(ValueError, match=r"pretrain/export has the hash \w+, but .*status.json says"):
        train(tiny(*KEPT, "autoencode.samples=48"), "autoencode")
    assert steps_in(copied, "autoencode") == [32]


@pytest.mark.parametrize("kind", ["checkpoint", "export"])
def test_a_run_starts_from_anothers_weights_alone(whole, tiny, tmp_path, kind):
    source = whole / "pretrain" / ("checkpoints/step_000000000096" if kind == "checkpoint" else "export")
    config = tiny(*KEPT, "pretrain.lr=0", f"checkpoint.start_from={source}", "pretrain.samples=8")
    assert train(config, "pretrain") == "done"
    ours = tensors(tmp_path / "run/pretrain/checkpoints/step_000000000008")
    theirs = tensors(whole / "pretrain/checkpoints/step_000000000096")
    for name, value in theirs.items():
        if name.startswith("ema/"):
            assert torch.equal(ours[f"param/{name.removeprefix('ema/')}"], value)
    assert f"starts with the weights of {source}" in (tmp_path / "run/pretrain/logs/rank_0.log").read_text()
    # a restart goes on from the run's own, with or without being told of the weights; others are another run
    assert train(dataclasses.replace(config), "pretrain") == "done"
    assert train(tiny(*KEPT, "pretrain.lr=0", "pretrain.samples=16"), "pretrain") == "done"
    with pytest.raises(ValueError, match=r"other settings: checkpoint\.start_from"):
        train(tiny(*KEPT, f"checkpoint.start_from={tmp_path}", "pretrain.lr=0", "pretrain.samples=24"), "pretrain")


def test_a_stage_starts_from_the_stage_before(whole, tiny, copied):
    """Autoencode's export warm-starts another autoencode: f, g and LoRA."""
    (shutil.rmtree(copied / "autoencode"))
    source = whole / "autoencode/export"
    config = tiny(*KEPT, "autoencode.samples=8", "autoencode.lr=0", f"checkpoint.start_from={source}")
    assert train(config, "autoencode") == "done"
    ours, theirs = (SPresso.from_pretrained(run / "autoencode/export") for run in (copied, whole))
    assert ours.model_hash == theirs.model_hash


def test_weights_that_do_not_fit_are_refused(whole, tiny, tmp_path):
    cases = {
        "neither a checkpoint nor an export": tmp_path / "nowhere",
        "no DiT|holds no|not a|no whole|config": tmp_path,
        "it has no ema/": whole / "autoencode/checkpoints/step_000000000032",
    }
    for told, source in cases.items():
        with pytest.raises(ValueError, match=told):
            train(tiny(*KEPT, f"checkpoint.start_from={source}", run_dir=tmp_path / "new"), "pretrain")


class Exploit:
    """Unpickled it makes a file: the sign that something was run."""

    def __init__(self, sign: Path) -> None:
        self.sign = sign

    def __reduce__(self):
        return os.system, (f"touch '{self.sign}'",)


def test_a_pickle_in_place_of_any_file_is_never_run(copied, tiny, tmp_path, caplog):
    sign = tmp_path / "was_run"
    content = pickle.dumps(Exploit(sign))
    files = [
        *(copied / "pretrain/checkpoints/step_000000000096").iterdir(),
        *(copied / "pretrain").glob("*.json"),
        *(copied / "pretrain").glob("*.yaml"),
        *(copied / "pretrain/export").iterdir(),
    ]
    assert len(files) >= 5
    for file in files:
        before = file.read_bytes()
        file.write_bytes(content)
        for stage in ("pretrain", "autoencode"):
            with suppress(ValueError, OSError):
                train(tiny(*KEPT, f"{stage}.samples=104"), stage)
        main(["checkpoint", str(copied / "pretrain")])
        main(["checkpoint", str(file.parent)])
        assert not sign.exists(), file
        if file.exists():
            file.write_bytes(before)
    pickle.loads(content)  # it would have
    assert sign.exists()


def test_the_command_lists_verifies_and_explains(copied, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "by_name").symlink_to(copied)
    monkeypatch.chdir(tmp_path)
    assert main(["checkpoint", "by_name"]) == 0
    by_name = capsys.readouterr().out.splitlines()
    assert main(["checkpoint", str(copied)]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[1:] for line in by_name[1:]] == [line.split()[1:] for line in listed[1:]]
    assert [line.split()[1] for line in listed[1:]] == ["32", "32", "64", "96"]  # autoencode's, and pretrain's
    assert "ddp on 1 rank" in listed[1]
    assert main(["checkpoint", "--verify", str(copied / "pretrain")]) == 0
    assert capsys.readouterr().out.count(": whole, ") == 3
    assert main(["checkpoint", str(copied / "autoencode/checkpoints/step_000000000032")]) == 0
    told = capsys.readouterr().out
    base = make_task(load_recipe("tiny", [f"run_dir={copied}"]), "autoencode").base_hash
    for part in ("autoencode", "32 in 4 steps", "D, LoRA", "param, ema, exp_avg, exp_avg_sq", base, "held_out_loss"):
        assert part in told

    [file] = (copied / "pretrain/checkpoints/step_000000000064").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert main(["checkpoint", "--verify", str(copied / "pretrain")]) == 1
    assert "rank_00000.safetensors has a wrong checksum" in capsys.readouterr().out
    file.unlink()
    assert main(["checkpoint", str(copied / "pretrain")]) == 0
    assert "DAMAGED: rank_00000.safetensors is missing" in capsys.readouterr().out
    assert main(["checkpoint", str(file.parent)]) == 2
    assert "is damaged: rank_00000" in capsys.readouterr().err
    assert main(["checkpoint", str(copied / "latents")]) == 2
    assert "holds no checkpoints" in capsys.readouterr().err


def test_the_best_are_kept_by_their_loss_on_held_out_clips(tiny, tmp_path):
    config = tiny(*PRETRAIN, "checkpoint.every=16", "checkpoint.keep_last=1", "checkpoint.keep_best=2")
    assert train(config, "pretrain") == "done"
    from trainer.log.metrics import read_metrics

    lines = read_metrics(tmp_path / "run/pretrain/metrics.jsonl")
    held_out = {line["samples"]: line["loss"] for line in lines if line["kind"] == "held_out"}
    assert len(held_out) == 6
    best = sorted(held_out, key=held_out.__getitem__)[:2]
    assert steps_in(tmp_path / "run") == sorted({*best, 96})


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_and_the_rank_s_log_says_so(copied, whole, tiny):
    newest = copied / "pretrain/checkpoints/step_000000000096"
    (newest / "manifest.json").unlink()
    assert train(tiny(*KEPT), "pretrain") == "done"
    log = (copied / "pretrain/logs/rank_0.log").read_text()
    assert f"WARNING DAMAGED CHECKPOINT {newest} is passed over" in log
    assert losses(copied) == losses(whole)
