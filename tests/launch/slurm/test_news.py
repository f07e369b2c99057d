"""What the end of a job tells `log.notify`: its end, its failure, a requeue without progress, and nothing else."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from launch.notify import News
from launch.slurm import news, requeue_policy
from launch.slurm.attempt import Attempt
from launch.slurm.requeue_policy import Verdict
from launch.slurm.submitted_jobs import Submitted, keep
from launch.slurm.variables import SUBMISSION

DONE = Verdict(requeue_policy.DONE, "")
REQUEUED = Verdict(requeue_policy.REQUEUE, "the time limit")


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Return a function that tells of the end of a stage's job, and returns the news and the target."""
    submission = tmp_path / "run/submissions/0001"
    submission.mkdir(parents=True)
    (submission / "config.yaml").write_text("name: mine\nlog: {notify: tell me}\n")
    monkeypatch.setenv(SUBMISSION, str(submission))

    def end(
        verdict: Verdict, past=(), place: int | None = 64, stage: str = "pretrain"
    ) -> tuple[str | None, News] | None:
        told = []
        monkeypatch.setattr(news, "notify", lambda target, item: told.append((target, item)))
        news.tell_of_end(Attempt(tmp_path / "run" / stage, "12", 1), verdict, past, place)
        return next(((target, item) for target, item in told if item.event), None)

    end.submission, end.root = submission, tmp_path / "run"
    return end


def requeued(place: int | None) -> dict:
    return {"job": "12", "restart": 0, "then": "requeued", "place": place}


@pytest.mark.parametrize("failure", ["mistake", "standstill", "RuntimeError: x", "requeue"])
def test_a_job_that_is_over_has_failed(job, failure):
    target, item = job(Verdict(requeue_policy.OVER, "no data", failure=failure))
    assert target == "tell me"
    assert item == News("failed", str(job.root), "mine", "pretrain", "no data", 64, "12")


def test_another_start_that_took_over_is_no_news(job):
    assert job(Verdict(requeue_policy.OVER, "taken over", failure="superseded")) is None


@pytest.mark.parametrize(
    ("past", "place", "stuck"),
    [
        ([], 64, False),
        ([requeued(32)], 64, False),
        ([requeued(64)], 64, True),
        ([requeued(64), requeued(32)], 64, False),
        ([requeued(0)], 0, True),
        ([requeued(None)], None, False),
    ],
)
def test_only_a_requeue_without_progress_is_told(job, past, place, stuck):
    told = job(REQUEUED, past, place)
    assert (told is not None) == stuck
    if told is not None:
        assert told[1].event == "no_progress"


def test_the_last_stage_of_a_submission_tells_of_the_end(job):
    jobs = [Submitted(stage, "1", str(job.submission), "log", 1.0) for stage in ("prepare", "pretrain", "autoencode")]
    keep(job.root, [*jobs, Submitted("page", "0", "/an/older/submission", "log", 1.0)])
    assert job(DONE, stage="pretrain") is None
    assert job(DONE, stage="autoencode")[1].event == "done"


def test_a_script_that_was_given_to_sbatch_tells_of_its_stage(job):
    assert job(DONE)[1].event == "done"


def test_the_pieces_of_evaluate_are_no_samples(job):
    assert job(DONE, place=3, stage="evaluate")[1].samples is None


@pytest.mark.parametrize("content", ["", "log: 7", "log: {notify: null}", "a: [", "name: x"])
def test_a_config_without_it_or_damaged_ends_nothing(job, content):
    (job.submission / "config.yaml").write_text(content)
    told = job(Verdict(requeue_policy.OVER, "x", failure="mistake"))
    assert told is None or told[0] is None


def test_the_real_script_calls_the_command_before_it_requeues(job, slurm, tmp_path, monkeypatch):
    from tests.launch.slurm.test_begin_end import ROOT, script

    slurm.answer("scontrol", 'case "$1" in show) echo localhost;; esac')
    out = tmp_path / "told.json"
    command = f"{sys.executable} -c 'import sys; open(sys.argv[1], \"a\").write(sys.stdin.read() + chr(10))' {out}"
    (job.submission / "config.yaml").write_text(json.dumps({"name": "mine", "log": {"notify": command}}))
    variables = {"SPRESSO_RUN": str(job.root), "SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "n1"}
    variables |= {"SLURM_JOB_NUM_NODES": "1", "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert script("begin", "pretrain").returncode == 0
    Attempt(job.root / "pretrain", "12", 0).note(0, "mistake", message="no data")
    assert script("end", "pretrain", "2").returncode == 2
    (line,) = Path(out).read_text().splitlines()
    assert json.loads(line)["text"] == "mine, pretrain: has failed: no data"
