from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch.slurm import node_check, submit, submitted_jobs
from trainer import provenance
from trainer.recipes.reading import load_recipe
from trainer.recipes.values import to_yaml

ACCEPTED = 'case "$*" in *--test-only*) ;; *) echo "Submitted batch job $((100 + count))";; esac'
FREE = "echo 'spresso: all is there'"


@pytest.fixture
def config(slurm, tmp_path, monkeypatch):
    """The tiny recipe for a cluster on which all goes well."""
    monkeypatch.chdir(tmp_path)
    slurm.answer("sbatch", ACCEPTED)
    slurm.answer("srun", FREE)
    return load_recipe("tiny", ["cluster=slurm", "cluster.gpus_per_node=0"])


def test_each_job_waits_for_the_one_before(config, slurm, tmp_path):
    handed_over = submit.run(config)
    assert [item.stage for item in handed_over] == config.stages
    handed = [call for call in slurm.calls("sbatch") if "test-only" not in call]
    scripts = [next((tmp_path / "runs/tiny/submissions/0001/jobs").glob(f"{item.job}_*.sh")) for item in handed_over]
    assert len(handed) == len(scripts)
    for before, script in zip(handed_over, scripts[1:], strict=False):
        assert f"#SBATCH --dependency=afterok:{before.job}\n" in script.read_text()
        assert "--kill-on-invalid-dep=yes" in script.read_text()
    assert submitted_jobs.submitted(tmp_path / "runs/tiny") == {item.stage: item for item in handed_over}


def test_what_is_refused_half_way_leaves_nothing_in_the_queue(config, slurm, tmp_path):
    tested = len(config.stages)
    slurm.answer("sbatch", "echo 'Batch job submission failed: too many jobs' >&2; exit 1", time=tested + 3)
    with pytest.raises(ValueError, match=r"refuses the job of pretrain: .*too many jobs"):
        submit.run(config)
    assert slurm.calls("scancel") == [f"{100 + tested + 1} {100 + tested + 2}"]
    assert submitted_jobs.submitted(tmp_path / "runs/tiny") == {}


def test_a_run_that_is_under_way_is_not_handed_over_again(config, slurm):
    [first] = submit.run(config, only="synth")
    slurm.answer("squeue", f"echo '{first.job}|{first.job}|PENDING||Priority'")
    with pytest.raises(ValueError, match=rf"wait or run: {first.job} \(synth\).*spresso cancel"):
        submit.run(config)
    slurm.answer("squeue", f"echo '{first.job}|{first.job}|FAILED||None'")
    submit.run(config)


def test_all_that_is_wrong_is_said_at_once_and_nothing_handed_over(config, slurm, tmp_path, monkeypatch):
    slurm.answer("sbatch", "echo 'allocation failure: Invalid partition' >&2; exit 1")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(ValueError, match="Invalid partition") as raised:
        submit.run(config)
    told = str(raised.value).splitlines()
    assert "free, but the checkpoints need" in told[0]
    assert len(told) == 1 + len(config.stages)
    assert list((tmp_path / "runs/tiny/submissions").iterdir()) == []
    assert all("--test-only" in call for call in slurm.calls("sbatch"))


def test_what_the_first_stage_builds_on_has_to_be_there(config, slurm):
    with pytest.raises(ValueError, match="latents"):
        submit.run(config, only="autoencode")


def test_a_checkpoint_that_is_damaged_is_found_before(config, slurm, tmp_path):
    damaged = tmp_path / "runs/tiny/pretrain/checkpoints/step_000000000008"
    damaged.mkdir(parents=True)
    with pytest.raises(ValueError, match=r"no checkpoint of .* is intact"):
        submit.run(config)


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ("echo 'spresso: missing'; echo \"a compute node can't import torch\"", "can't import torch"),
        ("echo 'bash: module: command not found' >&2; exit 127", "check on a compute node failed.*module"),
    ],
)
def test_a_compute_node_that_lacks_something(config, slurm, answer, problem):
    slurm.answer("srun", answer)
    with pytest.raises(ValueError, match=problem):
        submit.run(config)


def test_where_no_node_is_free_the_look_is_left_out(config, slurm, capsys):
    slurm.answer("srun", "echo 'srun: error: Unable to allocate resources: Requested nodes are busy' >&2; exit 1")
    submit.run(config, only="synth")
    assert "not checked on a compute node: none was free" in capsys.readouterr().err


def test_a_node_is_checked_inside_the_container(config, slurm):
    config.cluster.container = "apptainer exec image.sif"
    submit.run(config, only="synth")
    [checked] = [
        line for line in (slurm.folder / "calls").read_text().splitlines() if "launch.slurm.node_check" in line
    ]
    assert "exec apptainer exec image.sif python3 -m launch.slurm.node_check" in checked


def test_what_a_node_lacks_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("SPRESSO_RUN", str(tmp_path / "elsewhere"))
    assert "does not see" in node_check.look(gpus=False)[0]
    monkeypatch.setenv("SPRESSO_RUN", str(tmp_path))
    monkeypatch.setattr(node_check, "_NEEDED", ("json", "no_such_package"))
    [problem] = node_check.look(gpus=False)
    assert "can't import no_such_package" in problem


def test_a_job_uses_the_code_as_it_was(config, tmp_path):
    submit.run(config, only="synth")
    code = tmp_path / "runs/tiny/submissions/0001/code"
    (code / "COPIED_FROM").write_text("abc123\nchanges")
    # from a checkout that has another trainer/provenance.py in its folder, as an edited one would
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "provenance.py").write_text("raise SystemExit('edited')")
    program = "from trainer import provenance as code; print(code.__file__, code.code_version(), code.local_changes())"
    environment = os.environ | {"PYTHONPATH": str(code), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", program]
    said = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert said.split() == [str(code / "trainer" / "provenance.py"), "abc123", "changes"]


def test_without_slurm_it_says_where_to_go(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    with pytest.raises((ValueError, OSError), match=r"there is no s(batch|queue) here"):
        submit.run(load_recipe("tiny", ["cluster=slurm"]))


def ended(folder: Path, stage: str, samples: int = 128) -> None:
    (folder / stage / "export").mkdir(parents=True, exist_ok=True)
    (folder / stage / "export" / "dit.safetensors").touch()
    (folder / stage / "config.yaml").write_text(to_yaml(load_recipe("tiny", [])))
    (folder / stage / "status.json").write_text(f'{{"state": "done", "samples": {samples}, "export": "x"}}')


def test_what_has_ended_is_left_out(config, tmp_path, capsys):
    ended(tmp_path / "runs/tiny", "pretrain")
    stages = [item.stage for item in submit.run(config)]
    assert stages == [stage for stage in config.stages if stage != "pretrain"]
    assert submit.run(config, only="pretrain") == []
    assert "all stages are done" in capsys.readouterr().err


def test_latents_of_another_run_are_not_made_again(config, tmp_path):
    for split in ("train", "test"):
        (tmp_path / "latents" / split).mkdir(parents=True)
        (tmp_path / "latents" / split / "set.json").write_text("{}")
    config.data.latents = str(tmp_path / "latents")
    assert next(stage for stage, _ in submit.scripts(config)) == "pretrain"


def test_other_settings_in_the_same_place_are_refused(config, tmp_path):
    folder = tmp_path / "runs/tiny/pretrain"
    (folder / "checkpoints/step_000000000008").mkdir(parents=True)
    (folder / "config.yaml").write_text("pretrain: {lr: 7}\n")
    with pytest.raises(ValueError, match="holds a run with other settings"):
        submit.run(config, only="pretrain")


def test_what_a_job_needs_is_set_aside(config, tmp_path):
    submit.run(config, only="synth")
    shutil.rmtree(tmp_path / "runs/tiny/submissions/0001")
    submit.run(config, only="synth")
    (tmp_path / "runs/tiny/submissions/0007").mkdir()
    [job] = submit.run(config, only="synth")
    folder = tmp_path / "runs/tiny/submissions/0008"
    assert job.submission == str(folder)
    assert load_recipe(str(folder / "config.yaml"), []) == config
    assert provenance.code_version() in (folder / "code" / "COPIED_FROM").read_text()
    assert (tmp_path / "runs/tiny/synth/logs").is_dir()


def test_another_stage_s_job_is_no_hindrance(config, slurm):
    [first] = submit.run(config, only="synth")
    slurm.answer("squeue", f"echo '{first.job}|{first.job}|RUNNING||None'")
    submit.require_idle(Path("runs/tiny"), ["pretrain"])
    with pytest.raises(ValueError, match="wait or run"):
        submit.require_idle(Path("runs/tiny"), ["synth"])
