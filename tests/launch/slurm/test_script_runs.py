"""A job's script as bash runs it: in which order, in which environment, and with which status it ends."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from launch.slurm.job_script import Job, flags
from trainer.recipes.cluster import ClusterConfig

BEGIN, TASKS, END = (
    f"job-python {words}"
    for words in ("-m launch.slurm.begin_end begin", "-u -m launch.slurm.job_task", "-m launch.slurm.begin_end end")
)


@pytest.fixture
def script(slurm, tmp_path):
    """Makes the script of some stages, and runs it in the environment of a job."""
    slurm.command("job-python")
    slurm.answer("job-python", 'case "$*" in *" begin "*) echo "export MASTER_ADDR=\'first node\'";; esac')

    def make(*stages: str, run: Path = tmp_path / "run", **cluster) -> Job:
        asked = ClusterConfig(kind="slurm", python="job-python", **cluster)
        return Job(asked, stages, name="tiny", run=run, submission=run / "submissions" / "0001")

    return make


def ended(job: Job, **environment: str) -> int:
    return subprocess.run(["bash"], input=job.text, text=True, env=os.environ | environment, timeout=30).returncode


def calls(slurm) -> list[str]:
    """What was called, srun by the task that it starts."""
    lines = (slurm.folder / "calls").read_text().splitlines()
    return [line.partition("job-python")[2].strip() if line.startswith("srun") else line for line in lines]


def test_a_stage_from_its_beginning_to_its_end(script, slurm):
    slurm.answer("srun", f'echo "$MASTER_ADDR" > {slurm.folder}/seen; exit 7')
    assert ended(script("pretrain")) == 0
    assert calls(slurm) == [f"{BEGIN} pretrain", "-u -m launch.slurm.job_task pretrain", f"{END} pretrain 7"]
    assert (slurm.folder / "seen").read_text() == "first node\n"


def test_a_start_that_may_not_begin_starts_no_task(script, slurm):
    slurm.answer("job-python", "exit 2")
    assert ended(script("pretrain")) == 2
    assert calls(slurm) == [f"{BEGIN} pretrain"]


def test_a_stage_that_failed_is_the_job_s_status_and_no_other_follows(script, slurm):
    slurm.answer("job-python", "exit 1", time=2)
    assert ended(script("pretrain", "autoencode")) == 1
    assert calls(slurm)[-1] == f"{END} pretrain 0"


def test_all_stages_in_one_script_follow_each_other(script, slurm):
    assert ended(script("synth", "pretrain")) == 0
    assert [call.split()[-1] for call in calls(slurm) if " begin " in call or "launch.slurm.job_task" in call] == [
        *("synth", "synth", "pretrain", "pretrain")
    ]


def test_odd_names_come_through(script, slurm, tmp_path):
    run = tmp_path / "my $HOME; runs"
    shown = " ".join(f'"${name}"' for name in ("SPRESSO_RUN", "PYTHONPATH", "PYTHONSAFEPATH", "WORDS", "SPRESSO_GRACE"))
    slurm.answer("srun", f"printf '%s\\n' {shown} \"$@\" > {slurm.folder}/seen")
    words = "a 'b' $HOME *"
    job = script("pretrain", run=run, environment={"WORDS": words}, srun={"comment": "a b"}, grace_seconds=77)
    assert ended(job, PYTHONPATH="/mine") == 0
    seen = (slurm.folder / "seen").read_text().splitlines()
    assert seen[:5] == [str(run), f"{run}/submissions/0001/code:/mine", "1", words, "77"]
    assert "--comment=a b" in seen
    assert f"--output={run}/pretrain/logs/job_%j_%t.out" in seen


def test_the_code_s_copy_stands_alone_where_no_path_is_set(script, slurm, tmp_path):
    slurm.answer("srun", f'echo "$PYTHONPATH" > {slurm.folder}/seen')
    assert ended(script("pretrain"), PYTHONPATH="") == 0
    assert (slurm.folder / "seen").read_text() == f"{tmp_path}/run/submissions/0001/code\n"


def test_a_line_of_setup_that_fails_stops_no_stage(script, slurm):
    assert ended(script("pretrain", setup=["false", "export PATH_OF_MODULES=x"])) == 0
    assert calls(slurm)[0] == f"{BEGIN} pretrain"


def options(job: Job) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in job.text.splitlines() if line.startswith("#SBATCH")]


def test_options_are_written_as_they_are_meant(script):
    given = {"--gres": "gpu:2", "mail_type": "FAIL", "exclusive": True, "overcommit": False, "comment": None, "nice": 0}
    found = options(script("pretrain", options=given))
    assert {"--gres=gpu:2", "--mail-type=FAIL", "--exclusive", "--nice=0"} <= set(found)
    assert not [line for line in found if "overcommit" in line or "comment" in line]


def test_flags_of_srun_are_written_as_they_are_meant():
    given = {"--cpu-bind": "cores", "no_kill": True, "label": False, "mpi": None, "wait": 0}
    assert flags(given) == ["--cpu-bind=cores", "--no-kill", "--wait=0"]


def test_what_a_recipe_says_of_srun_goes_before_what_we_say(script):
    text = script("pretrain", srun={"kill_on_bad_exit": 0, "mpi": "pmix"}).text
    assert "--kill-on-bad-exit=0" in text
    assert "--kill-on-bad-exit=1" not in text


def test_only_prepare_is_an_array(script):
    assert "--array=0-3" in options(script("prepare", array=4))
    for job in (script("pretrain", array=4), script("synth", "prepare", array=4), script("prepare", array=1)):
        assert not [line for line in options(job) if line.startswith("--array")]
        assert "export SPRESSO_PARTS=1\n" in job.text
    assert "export SPRESSO_PARTS=4\n" in script("prepare", array=4).text


def test_every_log_has_its_folder(script, tmp_path):
    script("pretrain", "evaluate").make_folders()
    assert [(tmp_path / "run" / name / "logs").is_dir() for name in (".", "pretrain", "evaluate")] == [True] * 3
