"""Whatever happens to a job, its run ends like one that nothing interrupted."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch import pipeline
from launch.slurm.attempt import history
from tests.cluster.runs import LONG, SETTINGS, Run, assert_undisturbed
from tests.cluster.slurm_cluster import SlurmCluster
from tests.cluster.slurm_nodes import until
from tests.recorded import recorded_sounds
from trainer.loop import train
from trainer.recipes.reading import load_recipe

pytestmark = pytest.mark.alone
SHORT = 1200
Start = Callable[..., Run]


@pytest.fixture(scope="session")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepare latents of recorded sounds and return their folder."""
    folder = tmp_path_factory.mktemp("recorded")
    sounds = folder / "audio"
    sounds.mkdir()
    for number, path in enumerate(recorded_sounds(folder)[:80]):
        (sounds / f"{number:03d}{path.suffix}").symlink_to(path)
    pipeline.prepare_latents(load_recipe("tiny", [f"run_dir={folder}", f"data.audio={sounds}", "data.workers=1"]))
    return folder / "latents"


@pytest.fixture(scope="session")
def undisturbed(latents: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Train on one rank in this process, uninterrupted, and return the losses by samples."""
    folder = tmp_path_factory.mktemp("undisturbed")
    settings = [*SETTINGS, f"run_dir={folder}", f"data.latents={latents}", f"pretrain.samples={LONG}"]
    assert train(load_recipe("tiny", settings), "pretrain") == "done"
    run = Run.__new__(Run)
    run.stage = folder / "pretrain"
    return run.curve()


@pytest.fixture
def start(cluster: SlurmCluster, latents: Path, tmp_path: Path) -> Iterator[Start]:
    """Return a function that submits a run; afterwards cancel all jobs and check that none of its processes is left."""
    runs = []

    def submit(*overrides: str, fault: dict[str, object] | None = None, folder: str = "run") -> Run:
        run = Run(cluster, tmp_path / folder, latents, *overrides, fault=fault)
        runs.append(run)
        run.submit()
        return run

    yield submit
    cluster.command("scancel", "--user", str(os.getuid()))
    cluster.wait_ready(60)
    until(
        lambda: not [pid for run in runs for pid in run.ranks()], 30, "no rank left"
    )  # they die with their supervisors


def test_preempted_with_grace_it_loses_nothing(start: Start, undisturbed: dict[int, float]):
    run = start("cluster.partition=main", f"pretrain.samples={SHORT}")
    run.reach(300)
    run.preempt()
    [first] = run.starts(1)
    assert (first["why"], first["then"]) == ("was preempted", "requeued")
    assert first["place"] == run.samples > 300
    run.end()
    assert_undisturbed(run, undisturbed, SHORT)


def test_preempted_without_grace_it_saves_before_it_is_killed(start: Start, undisturbed: dict[int, float]):
    run = start(f"pretrain.samples={SHORT}", "cluster.partition=nograce")
    run.reach(300)
    run.preempt()
    run.end()
    # SLURM killed the batch script, so the next start writes how the first one ended
    first, _ = run.ended()
    assert first["place"] >= 300
    assert "SLURM requeued the job" in first["why"]
    assert_undisturbed(run, undisturbed, SHORT)


@pytest.mark.slow
def test_a_time_limit_again_and_again(start: Start, cluster: SlurmCluster, undisturbed: dict[int, float]):
    slow = {"what": "slow", "rank": 0, "seconds": 0.1, "always": True}
    run = start("cluster.time=1", "cluster.grace_seconds=40", fault=slow)
    while sum(entry["why"] == "the time limit is near" for entry in run.ended()) < 3:
        started = len(run.ended())
        run._until(lambda: len(run.ended()) > started, 90, "a limit")  # noqa: B023
        assert run.ended()[-1]["then"] == "requeued"
    cluster.command("scontrol", "update", f"JobId={run.job}", "TimeLimit=60")
    run.end()
    assert all(entry["then"] in ("requeued", "done") for entry in run.ended())
    assert_undisturbed(run, undisturbed)


@pytest.mark.slow
def test_cancelled_it_saves_and_stays_away(start: Start, cluster: SlurmCluster, undisturbed: dict[int, float]):
    run = start(f"pretrain.samples={SHORT}")
    run.reach(300)
    cluster.command("scancel", run.job)
    seen = run.samples
    run.end("CANCELLED")
    run._until(lambda: not run.ranks(), 20, "no rank left")
    assert max(int(path.name[5:]) for path in run.stage.glob("checkpoints/step_*")) >= seen
    time.sleep(2)
    assert cluster.state(run.job) == "CANCELLED"
    run.submit()
    run.end()
    assert_undisturbed(run, undisturbed, SHORT)


def test_a_node_that_dies_in_the_middle_of_a_step(start: Start, cluster: SlurmCluster, undisturbed: dict[int, float]):
    run = start(f"pretrain.samples={SHORT}")
    run.reach(700)
    cluster.cut_power("node2")
    try:
        run._until(lambda: cluster.state(run.job) == "PENDING" or len(run.ended()) > 0, 90, "the death to be noticed")
        run.end()
    finally:
        cluster.boot("node2")
    assert_undisturbed(run, undisturbed, SHORT)


@pytest.mark.slow
def test_a_node_that_is_cut_off_and_trains_on(start: Start, cluster: SlurmCluster, undisturbed: dict[int, float]):
    if cluster.mode != "netns":
        pytest.skip("nodes that share this machine's network can't be cut off")
    run = start("cluster.nodes=1", fault={"what": "slow", "rank": 0, "seconds": 0.3})
    run.reach(300)
    before = set(run.ranks())
    cut_off = cluster.job(run.job)["NodeList"]
    cluster.partition(cut_off)
    try:
        run._until(lambda: cluster.state(run.job) == "PENDING", 90, "it to be missed")
        run._until(lambda: len(set(run.ranks()) - before) >= 2, 60, "the next start")
        run._until(lambda: not before & set(run.ranks()), 30, "the first start's ranks to end")
        run.end()
    finally:
        cluster.heal(cut_off)
    assert_undisturbed(run, undisturbed)


def test_a_rank_that_is_killed(start: Start, undisturbed: dict[int, float]):
    run = start(f"pretrain.samples={SHORT}")
    run.reach(700)
    supervisors = run.supervisors()
    os.kill(run.rank(3), signal.SIGKILL)
    [first] = run.starts(1)
    assert (first["then"], first["place"], first["why"]) == ("restarted", 600, "rank 3 was killed by SIGKILL")
    run.end()
    assert [entry["then"] for entry in run.ended()] == ["restarted", "done"]
    assert len(supervisors) == 4
    assert_undisturbed(run, undisturbed, SHORT)


@pytest.mark.parametrize("what", ["kill_in_save", pytest.param("kill_in_evaluation", marks=pytest.mark.slow)])
def test_a_rank_that_is_killed_at_a_checkpoint(start: Start, undisturbed: dict[int, float], what: str):
    fault = {"what": what, "rank": 2, "at": 600, "once": True}
    settings = ("checkpoint.every=300", "parallel.micro_batch=2", f"pretrain.samples={SHORT}")
    run = start(*settings, fault=fault)
    run.end()
    first, last = run.ended()
    assert (first["then"], first["why"], last["then"]) == ("restarted", "rank 2 was killed by SIGKILL", "done")
    assert first["place"] == 300  # the evaluation at a checkpoint comes before its save
    assert not list(run.stage.glob("checkpoints/tmp_*")), "parts of the save are left"
    assert_undisturbed(run, undisturbed, SHORT)


def test_a_node_that_fails_the_check_is_left_out(start: Start, cluster: SlurmCluster, undisturbed: dict[int, float]):
    fault = {"what": "full_temp", "rank": 0, "once": True}
    run = start("cluster.check_nodes=true", f"pretrain.samples={SHORT}", "cluster.options.exclude=node4", fault=fault)
    run.end()
    first, last = run.ended()
    assert (first["then"], first["left_out"], last["then"]) == ("requeued", ["node1"], "done")
    assert "node1" in first["why"]
    assert cluster.job(run.job)["NodeList"] == "node[2-3]"
    assert cluster.job(run.job)["ExcNodeList"] == "node4,node1"
    assert_undisturbed(run, undisturbed, SHORT)


@pytest.mark.slow
def test_a_rank_that_raises_once(start: Start, undisturbed: dict[int, float]):
    run = start(f"pretrain.samples={SHORT}", fault={"what": "raise", "rank": 2, "at": 708, "once": True})
    run.end()
    first, last = run.ended()
    assert "rank 2 on node2: ArithmeticError: this sample is one too many" in first["why"]
    assert (first["then"], first["place"], last["then"]) == ("restarted", 600, "done")
    assert_undisturbed(run, undisturbed, SHORT)


@pytest.mark.slow
def test_a_rank_that_raises_at_the_same_sample_each_time(start: Start):
    run = start(f"pretrain.samples={SHORT}", fault={"what": "raise", "rank": 2, "at": 708})
    run.end("FAILED")
    first, second = run.ended()
    assert (first["then"], second["then"]) == ("restarted", "over")
    assert "it failed like this at the same place before" in second["why"]
    assert (run.stage / "owner.json").exists() is False


@pytest.mark.slow
def test_a_rank_that_hangs(start: Start, undisturbed: dict[int, float]):
    fault = {"what": "hang", "rank": 1, "at": 708, "once": True}
    run = start(f"pretrain.samples={SHORT}", "health.hang_seconds=5", fault=fault)
    run.end()
    assert [entry["then"] for entry in run.ended()] == ["restarted", "done"]
    assert "asked" in (run.stage / "logs" / "rank_1.log").read_text()  # the stack trace names the function that hangs
    assert_undisturbed(run, undisturbed, SHORT)


@pytest.mark.slow
def test_a_rank_that_hangs_when_there_is_notice(start: Start, cluster: SlurmCluster, undisturbed: dict[int, float]):
    fault = {"what": "hang", "rank": 1, "at": 708, "once": True}
    run = start(f"pretrain.samples={SHORT}", fault=fault)
    run._until(run.mark.exists, 60, "the fault")
    run.preempt()
    [first] = run.starts(1)
    assert "no step ended in time" in first["why"]
    assert first["place"] == 600
    run.end()
    assert_undisturbed(run, undisturbed, SHORT)


@pytest.mark.slow
def test_a_batch_that_does_not_come_when_there_is_notice(start: Start, undisturbed: dict[int, float], cluster):
    fault = {"what": "stall", "rank": 3, "at": 708, "once": True}
    run = start(f"pretrain.samples={SHORT}", fault=fault)
    run.reach(708)
    asked = time.monotonic()
    cluster.command("scancel", "--signal=USR2", run.job)
    [first] = run.starts(1)
    assert time.monotonic() - asked < 10
    assert first["place"] == 708  # everything before the step that waits for the batch is saved
    run.end()
    assert_undisturbed(run, undisturbed, SHORT)


@pytest.mark.slow
def test_notice_in_the_middle_of_an_evaluation(start: Start, undisturbed: dict[int, float], cluster: SlurmCluster):
    fault = {"what": "slow_evaluation", "rank": 1, "at": 0}
    run = start(f"pretrain.samples={SHORT}", "log.held_out=200", "parallel.micro_batch=2", fault=fault)
    run._until(run.mark.exists, 60, "an evaluation")
    asked = time.monotonic()
    cluster.command("scancel", "--signal=USR2", run.job)
    [first] = run.starts(1)
    assert time.monotonic() - asked < 8  # the whole evaluation would take 25 seconds
    assert first["place"] == run.samples == 600
    cluster.command("scancel", run.job)


def test_other_numbers_of_nodes_each_time(start: Start, cluster: SlurmCluster, undisturbed: dict[int, float]):
    run = start("cluster.nodes=1-4", "cluster.tasks_per_node=1")
    for down, samples in (("node3", "node4"), 800), (("node2",), 2000), ((), 3200):
        run.reach(samples)
        cluster.command("scancel", "--signal=USR2", run.job)
        run._until(lambda: cluster.state(run.job) == "PENDING", 30, "to be requeued")
        for name in down:
            cluster.command("scontrol", "update", f"NodeName={name}", "State=DRAIN", "Reason=test")
        run._until(lambda: cluster.state(run.job) == "RUNNING", 60, "to come back")
        for name in down:
            cluster.command("scontrol", "update", f"NodeName={name}", "State=RESUME")
    run.end()
    counts = [int(entry["count"]) for entry in history(run.stage) if "began" in entry]
    assert counts == [4, 2, 3, 4]
    assert_undisturbed(run, undisturbed)


@pytest.mark.slow
def test_a_full_disk_during_a_save(start: Start, small_disk: Path, latents: Path, cluster, undisturbed):
    run = Run(cluster, small_disk / "run", latents, f"pretrain.samples={SHORT}", "checkpoint.keep_last=1")
    ballast = small_disk / "ballast"

    def fill() -> None:
        with ballast.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(65536))
            except OSError:
                pass

    run.submit()
    run.reach(700)
    fill()
    run.end("FAILED")
    kept = [path.name for path in run.stage.glob("checkpoints/step_*")]
    assert kept == ["step_000000000600"]
    ballast.unlink()
    run.submit()
    run.end()
    assert_undisturbed(run, undisturbed, SHORT)
