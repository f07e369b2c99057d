"""Which stages are handed over, with which code and config, and what is asked of a compute node before."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from launch.slurm import node_check, preflight, submit, submitted_jobs
from launch.slurm.submitted_jobs import Submitted
from trainer.provenance import code_version, local_changes
from trainer.recipes.reading import load_recipe
from trainer.recipes.schema import Config
from trainer.recipes.values import to_yaml

ROOT = Path(__file__).parents[3]
ACCEPTED = 'case "$*" in *--test-only*) ;; *) echo "Submitted batch job $((100 + count))";; esac'
FREE = "echo 'spresso: all is there'"


@pytest.fixture
def config(slurm, tmp_path, monkeypatch):
    """Makes the tiny recipe for a cluster on which all goes well; takes overrides."""
    monkeypatch.chdir(tmp_path)
    slurm.answer("sbatch", ACCEPTED)
    slurm.answer("srun", FREE)

    def make(*overrides: str) -> Config:
        return load_recipe("tiny", ["cluster=slurm", "cluster.gpus_per_node=0", *overrides])

    return make


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "runs" / "tiny"


def has_ended(root: Path, stage: str, samples: int) -> None:
    (root / stage / "export").mkdir(parents=True)
    (root / stage / "export" / "dit.safetensors").touch()
    (root / stage / "config.yaml").write_text(to_yaml(load_recipe("tiny", [])))
    (root / stage / "status.json").write_text(json.dumps({"state": "done", "samples": samples, "export": "0123"}))


def stages(config: Config) -> list[str]:
    return [stage for stage, _ in submit.scripts(config)]


def test_stages_that_have_ended_are_left_out(config, root):
    tiny = config()
    has_ended(root, "pretrain", tiny.pretrain.samples)
    has_ended(root, "autoencode", tiny.autoencode.samples - 1)
    assert stages(tiny) == [stage for stage in tiny.stages if stage != "pretrain"]
    assert "pretrain" in stages(config(f"pretrain.samples={tiny.pretrain.samples + 32}"))


def test_where_all_have_ended_nothing_is_handed_over(config, root, slurm):
    tiny = config()
    has_ended(root, "pretrain", tiny.pretrain.samples)
    assert submit.run(tiny, only="pretrain") == []
    assert slurm.calls("sbatch") == []
    assert not (root / "submissions").exists()


def test_latents_of_another_run_are_not_made_again(config, tmp_path):
    for split in ("train", "test"):
        (tmp_path / "latents" / split).mkdir(parents=True)
        (tmp_path / "latents" / split / "set.json").write_text("{}")
    found = stages(config(f"data.latents={tmp_path / 'latents'}"))
    assert "pretrain" in found
    assert not {"synth", "prepare"} & set(found)


def test_a_run_of_other_settings_is_not_gone_on_with(config, root, slurm):
    (root / "pretrain/checkpoints/step_000000000008").mkdir(parents=True)
    (root / "pretrain/config.yaml").write_text(to_yaml(config("pretrain.lr=0.5")))
    with pytest.raises(ValueError, match=r"holds a run with other settings: pretrain\.lr"):
        submit.run(config())
    assert slurm.calls("sbatch") == []


def test_a_stage_waits_for_no_other_s_job(config, root, slurm):
    root.mkdir(parents=True)
    submitted_jobs.keep(root, [Submitted("synth", "7", "", "", 0.0)])
    slurm.answer("squeue", "echo '7|7|RUNNING|n1|None'")
    submit.require_idle(root, ["prepare"])
    with pytest.raises(ValueError, match=r"7 \(synth\)"):
        submit.require_idle(root, ["synth", "prepare"])


def test_two_submissions_at_one_moment_are_one(config, root, slurm):
    tiny, code = config(), "from launch import owner; from pathlib import Path; import sys\n"
    code += f"with owner.holding(Path({str(root)!r})): print(1, flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"1\n"
        with pytest.raises(ValueError, match="wait for it, or end it"):
            submit.run(tiny)
    assert slurm.calls("sbatch") == []
    assert submit.run(tiny)


def test_the_copy_says_what_it_was_made_of_and_no_edit_reaches_it(config, root, tmp_path, monkeypatch):
    checkout = tmp_path / "checkout"
    for package in ("models", "trainer", "launch", "configs"):
        (checkout / package / "__pycache__").mkdir(parents=True)
        (checkout / package / "some.py").write_text("before")
    monkeypatch.setattr(submit, "RECIPES", checkout / "configs")
    tiny = config("seed=7")
    submit.run(tiny, only="synth")
    (checkout / "trainer" / "some.py").write_text("after")
    folder = root / "submissions" / "0001"
    assert (folder / "code" / "trainer" / "some.py").read_text() == "before"
    assert not list(folder.rglob("__pycache__"))
    assert (folder / "code" / "COPIED_FROM").read_text() == f"{code_version()}\n{local_changes()}"
    assert load_recipe(str(folder / "config.yaml"), []) == tiny


def test_a_submission_takes_the_place_of_none_before(config, root):
    (root / "submissions" / "0004").mkdir(parents=True)
    submit.run(config(), only="synth")
    assert sorted(path.name for path in (root / "submissions").iterdir()) == ["0004", "0005"]


def test_a_script_by_hand_has_its_folders_and_config(config, root):
    submit.whole_script(config(), only="pretrain")
    assert (root / "pretrain" / "logs").is_dir()
    assert load_recipe(str(root / "config.yaml"), []).name == "tiny"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_whatever_interrupts_a_submission_nothing_is_left_in_the_queue(config, root, slurm, monkeypatch, error):
    hand_over = submit.Job.hand_over

    def interrupted(job: submit.Job) -> str:
        if job.stages == ["pretrain"]:
            raise error
        return hand_over(job)

    monkeypatch.setattr(submit.Job, "hand_over", interrupted)
    with pytest.raises(type(error)):
        submit.run(config())
    [cancelled] = slurm.calls("scancel")
    assert len(cancelled.split()) == 2
    assert submitted_jobs.submitted(root) == {}


def test_sbatch_is_asked_about_jobs_without_those_that_they_wait_for(config, slurm):
    slurm.answer("sbatch", f'{ACCEPTED}; [ "$1" != --test-only ] || cat "$2" >> {slurm.folder}/tested')
    submit.run(config())
    tested = (slurm.folder / "tested").read_text()
    assert tested.count("#!/bin/bash") == len(config().stages)
    assert "--dependency" not in tested


def test_a_stage_whose_export_is_gone_has_not_ended(config, root):
    tiny = config()
    has_ended(root, "pretrain", tiny.pretrain.samples)
    (root / "pretrain/export/dit.safetensors").unlink()
    assert "pretrain" in stages(tiny)


def test_a_run_that_was_not_to_go_on_is_said_to_be_there(config, root, monkeypatch):
    whole = root / "pretrain/checkpoints/step_000000000008"
    whole.mkdir(parents=True)
    monkeypatch.setattr("launch.slurm.preflight.checkpoint.newest", lambda folder: whole)
    with pytest.raises(ValueError, match=r"holds a run, and checkpoint\.resume=never"):
        submit.run(config("checkpoint.resume=never"))


def test_without_sbatch_nothing_is_left_behind(config, root, monkeypatch):
    monkeypatch.setenv("PATH", str(root))
    with pytest.raises(ValueError, match="there is no sbatch here"):
        submit.run(config())
    assert list((root / "submissions").iterdir()) == []


def test_the_look_at_a_compute_node_asks_for_what_the_jobs_ask_for(config, slurm):
    asks = (
        *("cluster.gpus_per_node=4", "cluster.partition=gpu", "cluster.qos=low", "cluster.account=audio"),
        *("cluster.options.mail_type=FAIL", "cluster.srun.container-image=/x.sqsh", "cluster.setup=[module load x]"),
    )
    submit.run(config(*asks))
    call = (slurm.folder / "calls").read_text().partition("srun ")[2].partition("\nsbatch ")[0]
    for option in (
        "partition=gpu",
        "qos=low",
        "account=audio",
        "container-image=/x.sqsh",
        "gpus-per-node=1",
        "nodes=1",
    ):
        assert f"--{option} " in call
    assert "mail" not in call
    assert call.index("module load x") < call.index("export PYTHONPATH=") < call.index("-m launch.slurm.node_check 1")


def test_gpus_that_are_asked_for_by_gres_are_not_asked_for_twice(config, slurm):
    submit.run(config("cluster.gpus_per_node=4", "cluster.options.gres='gpu:a100:4'"), only="synth")
    assert "gpus-per-node" not in "".join(slurm.calls("srun"))


def test_a_compute_node_that_never_answers_is_no_reason_to_wait(config, slurm, monkeypatch, capsys):
    monkeypatch.setattr(preflight, "_PATIENCE", 0.3)
    slurm.answer("srun", "exec sleep 30")
    submit.run(config(), only="synth")
    assert "not checked on a compute node: no answer" in capsys.readouterr().err


@pytest.mark.parametrize(("gpus", "found", "told"), [(True, False, 1), (True, True, 0), (False, False, 0)])
def test_gpus_that_torch_does_not_find_are_a_problem_where_they_are_asked_for(tmp_path, monkeypatch, gpus, found, told):
    monkeypatch.setenv("SPRESSO_RUN", str(tmp_path))
    monkeypatch.setattr(node_check, "_NEEDED", ("json",))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: found)
    assert len(node_check.look(gpus)) == told
