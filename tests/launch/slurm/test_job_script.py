"""What sbatch is given. `SPRESSO_REWRITE=1 pytest` on this file writes the golden scripts anew."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from launch import pipeline
from launch.slurm import submit, worker
from launch.slurm.attempt import Attempt
from launch.slurm.slurm_task import SlurmTask
from launch.slurm.variables import PARTS, SUBMISSION
from trainer.recipes.reading import RECIPES, load_recipe

GOLDEN = Path(__file__).parents[1] / "golden"
CLUSTERS = sorted(path.stem for path in (RECIPES / "cluster").glob("*.yaml"))


def scripts(run_dir: Path, *overrides: str) -> dict[str, str]:
    return dict(submit.scripts(load_recipe("tiny", [f"run_dir={run_dir}", *overrides])))


def options(script: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]
    return dict((line + "=").split("=", 1) for line in lines)


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_the_scripts_of_the_example_clusters(cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    made = scripts(tmp_path / "runs" / "tiny", f"cluster={cluster}")
    text = "\n".join(f"# ---- {stage}\n{script}" for stage, script in made.items())
    text = text.replace(str(tmp_path), "/home/me").replace(sys.executable, "/home/me/.venv/bin/python")
    path = GOLDEN / f"{cluster}.sh"
    if os.environ.get("SPRESSO_REWRITE"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()
    for script in made.values():
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_every_option_of_sbatch_and_srun_is_reachable(tmp_path):
    given = {
        "options.exclusive": "true",
        "options.gres": "'gpu:a100:4'",
        "options.mail_type": "FAIL",
        "srun.container-image": "/images/x.sqsh",
        "srun.no-container-mount-home": "true",
        "setup": "[module load cuda]",
        "environment.NCCL_DEBUG": "INFO",
        "account": "audio",
        "qos": "low",
        "constraint": "h100",
        "mem": "200G",
        "time": "2-12",
    }
    made = scripts(tmp_path, "cluster=slurm", *(f"cluster.{key}={value}" for key, value in given.items()))
    script = made["autoencode"]
    found = options(script)
    assert found["exclusive"] == ""
    assert (found["gres"], found["mail-type"]) == ("gpu:a100:4=", "FAIL=")
    assert (found["mem"], found["time"]) == ("200G=", "2-12=")
    assert (found["account"], found["qos"], found["constraint"]) == ("audio=", "low=", "h100=")
    assert "--container-image=/images/x.sqsh --no-container-mount-home" in script
    assert (
        script.index("module load cuda")
        < script.index("export NCCL_DEBUG=INFO")
        < script.index("launch.slurm.begin_end begin")
    )


def test_jobs_come_back_whatever_the_cluster_s_defaults_are(tmp_path):
    for script in scripts(tmp_path, "cluster=slurm", "cluster.grace_seconds=300").values():
        found = options(script)
        assert found["requeue"] == ""
        assert (found["signal"], found["open-mode"]) == ("USR2@300=", "append=")
        assert "--kill-on-bad-exit=1" in script


def test_stages_have_their_own(tmp_path):
    made = scripts(tmp_path, "cluster=preemptible", "cluster.stages.finetune.time=60")
    assert options(made["pretrain"])["nodes"] == "2-8="
    assert (options(made["prepare"])["array"], options(made["prepare"])["partition"]) == ("0-15=", "cpu=")
    assert "exclusive" in options(made["pretrain"])
    assert "exclusive" not in options(made["prepare"])
    assert options(made["finetune"])["time"] == "60="
    assert (options(made["evaluate"])["gpus-per-node"], options(made["evaluate"])["nodes"]) == ("1=", "1=")


def test_one_script_for_all_stages(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_recipe("tiny", ["cluster=slurm", "cluster.nodes=2"])
    script = submit.whole_script(config)
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    at = [script.index(f"launch.slurm.job_task {stage}\n") for stage in config.stages]
    assert at == sorted(at)
    assert (tmp_path / "runs/tiny/submissions/0001/code/launch/slurm/job_task.py").exists()
    assert options(script)["nodes"] == "2="
    assert "--nodes=1 --ntasks=1" in next(
        line for line in script.splitlines() if "launch.slurm.job_task prepare" in line
    )
    assert "--ntasks=1" not in next(line for line in script.splitlines() if "launch.slurm.job_task pretrain" in line)


def test_words_with_spaces_stay_whole(tmp_path):
    run_dir = tmp_path / "a run"
    overrides = ["cluster=slurm", "cluster.environment.FLAGS=-a -b", "cluster.srun.cpu_bind=map cpu:1"]
    script = scripts(run_dir, *overrides)["autoencode"]
    assert "export FLAGS='-a -b'\n" in script
    assert f"export PYTHONPATH='{run_dir}/submissions/0001/code'" in script
    [line] = [line for line in script.splitlines() if line.startswith("srun ")]
    assert "--cpu-bind=map cpu:1" in shlex.split(line)
    assert any(word.startswith(f"--output={run_dir}/") for word in shlex.split(line))


def test_only_prepare_is_an_array_and_false_is_left_out(tmp_path):
    made = scripts(tmp_path, "cluster=slurm", "cluster.array=3", "cluster.options.overcommit=false")
    assert [stage for stage, script in made.items() if "array" in options(script)] == ["prepare"]
    assert all("overcommit" not in script for script in made.values())


def test_evaluate_is_an_array_where_the_recipe_says_so(tmp_path):
    made = scripts(tmp_path, "cluster=slurm", "cluster.stages.evaluate.array=4")
    found = {stage: options(script).get("array") for stage, script in made.items()}
    assert {stage: array for stage, array in found.items() if array} == {"prepare": "0-7=", "evaluate": "0-3="}
    assert "export SPRESSO_PARTS=4\n" in made["evaluate"]
    assert "/evaluate/logs/job_%A_%a_%t.out" in made["evaluate"]


@pytest.mark.parametrize("stage", ["prepare", "evaluate"])
def test_an_element_of_an_array_does_its_part(stage, tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text("name: tiny\n")
    for variable, value in ((SUBMISSION, tmp_path), ("SLURM_ARRAY_TASK_ID", 2), (PARTS, 4)):
        monkeypatch.setenv(variable, str(value))
    done = []
    monkeypatch.setitem(pipeline.UNTRAINED, stage, lambda config, **which: done.append((config.name, which)))
    attempt = Attempt(tmp_path / stage, "12", 0)
    task = SlurmTask(rank=0, count=1, local_rank=0, local_counts=(1,))
    assert worker._share(stage, attempt, task, None, None) == "done"
    assert done == [("tiny", {"part": 2, "parts": 4})]


def test_a_job_of_a_range_of_nodes_may_come_back_with_fewer(tmp_path):
    # 22.05 holds a requeued job to the nodes that it had, where sbatch was told --ntasks-per-node
    script = scripts(tmp_path, "cluster=preemptible")["pretrain"]
    found = options(script)
    assert "ntasks-per-node" not in found
    assert (found["nodes"], found["mincpus"]) == ("2-8=", "64=")
    [line] = [line for line in script.splitlines() if line.startswith("srun ")]
    assert {"--ntasks-per-node=8", "--cpus-per-task=8"} <= set(shlex.split(line))
