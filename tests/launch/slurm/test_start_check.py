"""Which nodes fail the check at a job's start, and how a job is requeued without them."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from launch.slurm import begin_end, leave_out, node_check, start_check
from launch.slurm.attempt import Attempt, history, record
from launch.slurm.node_health import MARK, lines
from launch.slurm.node_links import measure_links, neighbour, turns
from launch.slurm.start_check import Findings, check_nodes, compare
from launch.slurm.variables import RUN, SUBMISSION
from tests.trainer import rank_processes
from trainer.recipes.cluster import ClusterConfig
from trainer.recipes.reading import load_recipe
from trainer.recipes.values import to_yaml

NODES = ["n1", "n2", "n3", "n4"]


def links(node: str, slow: str = "") -> dict[str, float]:
    """Times of the exchanges of a node in a ring with both its neighbours; those with `slow` take ten times as long."""
    number = NODES.index(node)
    neighbours = [NODES[number - 1], NODES[(number + 1) % len(NODES)]]
    return {each: 0.010 if slow in (node, each) else 0.001 for each in neighbours}


def reports(**changes):
    """Reports of four healthy nodes, n1 to n4, with changes of some."""
    found = {}
    for node in NODES:
        made = {"node": node, "clock": 0.0, "faults": [], "passed_over": [], "network": "", "reached": True}
        made |= {"products": {"GPU 0": 0.0101, "GPU 1": 0.0099}, "ahead": 0.2, "links": links(node)}
        made |= changes.get(node, {})
        found[node] = (made, made.pop("ahead"))
    return found


def test_healthy_nodes():
    assert compare(NODES, reports()) == Findings()


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"products": {"GPU 0": 0.010, "GPU 1": 0.032}}, "GPU 1 takes 3.2 times as long"),
        ({"ahead": -42.0}, "has a clock that is 42 s behind"),
        ({"ahead": 11.0}, "has a clock that is 11 s ahead"),
        ({"reached": False, "network": "timed out"}, "does not reach n1: timed out"),
        ({"faults": ["GPU 0 has damaged memory"]}, "GPU 0 has damaged memory"),
    ],
)
def test_a_node_that_fails_is_named(change, fault):
    found = compare(NODES, reports(n3=change))
    assert list(found.faults) == ["n3"]
    assert found.faults["n3"][0].startswith(fault)


def test_a_node_whose_links_are_all_slow_is_named_and_its_neighbours_are_not():
    found = compare(NODES, reports(**{node: {"links": links(node, slow="n3")} for node in NODES}))
    assert list(found.faults) == ["n3"]
    assert found.faults["n3"][0].startswith("takes 10.0 times as long")
    one = {"n2": {"links": {"n1": 0.001, "n3": 0.010}}, "n3": {"links": {"n2": 0.010, "n4": 0.001}}}
    assert compare(NODES, reports(**one)).faults == {}  # a bad cable between two nodes that are well otherwise
    unmeasured = {node: {"links": {}} for node in NODES}
    assert compare(NODES, reports(**unmeasured)) == Findings()


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8, 9])
def test_each_node_exchanges_data_with_both_neighbours_of_a_ring(count):
    met: dict[int, list[int]] = {rank: [] for rank in range(count)}
    for turn in range(turns(count)):
        for rank in range(count):
            if (other := neighbour(rank, count, turn)) is not None:
                assert neighbour(other, count, turn) == rank
                met[rank].append(other)
    assert all(sorted(met[rank]) == sorted({(rank - 1) % count, (rank + 1) % count}) for rank in range(count))


def test_links_are_measured_by_names():
    assert rank_processes.run(_measure, 3, rank_processes.free_port(), seconds=100) == [0, 0, 0]


def _measure(rank: int, port: int) -> None:
    store = torch.distributed.TCPStore("127.0.0.1", port, 3, rank == 0)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=3)
    found = measure_links(torch, store, "cpu", f"n{rank}")
    assert sorted(found) == sorted({"n0", "n1", "n2"} - {f"n{rank}"})
    assert all(seconds > 0 for seconds in found.values())
    torch.distributed.barrier()


def test_devices_of_all_nodes_set_the_measure_and_two_set_none():
    slower = {"products": {"GPU 0": 0.018, "GPU 1": 0.018}}
    assert compare(NODES, reports(n1=slower, n2=slower)).faults == {}
    two = {"n1": reports()["n1"], "n2": reports(n2={"products": {"GPU 0": 9.0}})["n2"]}
    two["n1"][0]["products"] = {"GPU 0": 0.01}
    assert compare(["n1", "n2"], two).faults == {}  # either could be the one that is not as it should be


def test_a_node_without_a_report_fails_only_if_most_have_one(monkeypatch):
    some = reports()
    del some["n2"]
    assert list(compare(NODES, some).faults) == ["n2"]
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-4]")
    monkeypatch.setattr(start_check.scheduler, "hostnames", lambda nodes: NODES)
    monkeypatch.setattr(start_check, "_reports", lambda *_: ({"n1": reports()["n1"]}, "srun: no"))
    assert check_nodes(ClusterConfig(), 1) == Findings(remarks=["the nodes were not checked: srun: no"])


def test_a_sum_that_fails_on_all_nodes_is_no_node_s_fault():
    failed = {"network": "NCCL error"}
    found = compare(NODES, reports(n1=failed, n2=failed, n3=failed, n4=failed))
    assert found.faults == {}
    assert "can't sum a tensor together: NCCL error" in found.remarks[0]


@pytest.fixture
def srun_says(slurm, monkeypatch):
    """Makes srun print lines in a job on n1 to n4."""
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-4]")
    slurm.answer("scontrol", "printf 'localhost\\nn2\\nn3\\nn4\\n'", time=1)
    slurm.answer("scontrol", "echo localhost")

    def says(*printed: str, before: str = ":", after: str = ":") -> None:
        (slurm.folder / "printed").write_text("\n".join(printed))
        slurm.answer("srun", f"{before}; cat {slurm.folder}/printed; {after}")

    return says


def test_reports_are_found_among_lines_of_modules(slurm, srun_says):
    made = reports()["n1"][0] | {"clock": 4_000_000_000.0}
    others = [line for node in ("n2", "n3", "n4") for line in lines(reports()[node][0] | {"clock": time.time()}, node)]
    srun_says("loading modules", *lines(made, "0"), *others, "bye")
    found = check_nodes(ClusterConfig(python="my-python", gpus_per_node=2), 12345)
    assert found.faults["localhost"] == ["gave no report, as the others did: look at SLURM's log of the node"]
    assert "has a clock that is" in found.faults["n1"][0]
    [call] = slurm.calls("srun")
    assert "--nodes=4 --ntasks=4 --ntasks-per-node=1" in call
    assert "unbuffered" not in call  # srun would mix the lines of the nodes
    assert call.endswith("exec my-python -m launch.slurm.node_health 2 12345")


def test_long_reports_come_in_lines_that_srun_keeps_whole(srun_says):
    told = [f"GPU {number} has damaged memory (ECC) that waits to be replaced: have it reset" for number in range(30)]
    made = {node: reports(n3={"faults": told})[node][0] | {"clock": time.time()} for node in NODES}
    printed = [lines(made[node], str(rank)) for rank, node in enumerate(NODES)]
    assert max(len(line) for each in printed for line in each) < 1024
    assert len(printed[2]) > 2
    srun_says(*(line for turn in itertools.zip_longest(*printed) for line in turn if line is not None))
    found = check_nodes(ClusterConfig(), 12345)
    assert found.faults["n3"] == told
    assert found.remarks == []


def test_many_warnings_of_the_nodes_hold_up_no_report(srun_says):
    made = [line for node in NODES for line in lines(reports()[node][0] | {"clock": time.time()}, node)]
    srun_says(*made, before="head --bytes=300000 /dev/zero | tr '\\0' w >&2")
    found = check_nodes(ClusterConfig(), 12345)
    assert list(found.faults) == ["localhost"], found


def test_a_damaged_report_ends_the_check_at_once(srun_says, monkeypatch):
    started = []

    class Popen(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            started.append(self)

    monkeypatch.setattr(start_check.subprocess, "Popen", Popen)
    srun_says(f"{MARK}0 last {{", "", after="exec sleep 20")  # a node hangs
    [remark] = check_nodes(ClusterConfig(), 12345).remarks
    assert remark.startswith("the nodes were not checked: a node's report is damaged")
    assert started[-1].returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("faulty", "before", "most", "expected"),
    [
        (["n1"], [], 1, ["n1"]),
        (["n1", "n2"], [], 1, ["n1"]),
        (["n2"], ["n1"], 1, []),
        (["n1", "n2"], ["n1"], 2, ["n2"]),
        (["n1"], [], 0, []),
    ],
)
def test_no_more_nodes_are_left_out_than_allowed(faulty, before, most, expected):
    assert leave_out.chosen(faulty, before, most) == expected


@pytest.fixture
def kept_handler():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_those_left_out_join_those_that_were(slurm, kept_handler):
    slurm.answer("scontrol", "echo 'JobId=12 ExcNodeList=n[1-2,4],m5 NumNodes=2'", time=1)
    slurm.answer("scontrol", "echo 'Job is no longer pending execution' >&2; exit 1", time=3)
    leave_out.requeue_without("12", ["n7", "m5"])
    assert slurm.calls("scontrol")[1:] == [
        "requeue 12",
        *["update JobId=12 ExcNodeList=n[1-2,4],m5,n7"] * 2,  # SLURM takes it once the job waits
    ]


def test_a_start_on_a_faulty_node_ends_before_it_begins(tmp_path, monkeypatch):
    attempt, requeued = Attempt(tmp_path / "pretrain", "12", 0), []
    monkeypatch.setattr(begin_end, "_check_nodes", lambda attempt: {"n1": ["has no GPU", "and no disk"]})
    monkeypatch.setattr(begin_end.leave_out, "requeue_without", lambda *asked: requeued.append(asked))
    monkeypatch.setattr(begin_end, "_PAUSE", 0.0)
    monkeypatch.setattr(begin_end.scheduler, "alive", lambda numbers: [])
    for name, value in ((RUN, str(tmp_path)), ("SLURM_JOB_NODELIST", "n1"), ("SLURM_JOB_NUM_NODES", "1")):
        monkeypatch.setenv(name, value)
    assert begin_end._begin(attempt) == 1
    assert requeued == [("12", ["n1"])]
    [entry] = history(attempt.stage_folder)
    assert (entry["then"], entry["left_out"], entry["why"]) == ("requeued", ["n1"], "n1 has no GPU")
    assert leave_out.left_out([entry], "12") == ["n1"]
    assert leave_out.left_out([entry], "13") == []
    assert begin_end.ended([entry], "12") == []  # it counts for no failure of the training


def test_all_stages_of_a_job_share_the_bound(tmp_path, monkeypatch):
    job = {"job": "12_3", "restart": 0}
    record(tmp_path / "pretrain", job | {"ended": 1.0, "then": "requeued", "left_out": ["n1"], "by": "slurm"})
    (tmp_path / "config.yaml").write_text(to_yaml(load_recipe("tiny", ["cluster.leave_out=2"])))
    monkeypatch.setenv(SUBMISSION, str(tmp_path))
    monkeypatch.setattr(begin_end, "check_nodes", lambda cluster, port: Findings({"n2": ["a"], "n3": ["b"]}))
    assert begin_end._check_nodes(Attempt(tmp_path / "autoencode", "12_3", 1)) == {"n2": ["a"]}
    assert begin_end._check_nodes(Attempt(tmp_path / "autoencode", "12_4", 0)) == {"n2": ["a"], "n3": ["b"]}


def test_packages_of_trackers_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv(RUN, str(tmp_path))
    monkeypatch.setattr(node_check, "_NEEDED", ())
    monkeypatch.setattr(node_check.importlib.util, "find_spec", lambda name: None if name == "mlflow" else True)
    [line] = node_check.look(False, ["tensorboard", "mlflow"])
    assert "no package mlflow for log.trackers" in line
    assert sys.executable in line


def test_a_full_folder_for_temporary_files(monkeypatch, tmp_path):
    from launch.slurm import node_health

    monkeypatch.setenv(RUN, str(tmp_path))
    assert node_health.faults_here(0) == ([], [])
    monkeypatch.setattr(node_health, "_TEMP", 2**70)
    assert "free: have it emptied" in node_health.faults_here(0)[0][0]
    monkeypatch.setenv(RUN, os.fspath(tmp_path / "away"))
    assert "is not seen" in node_health.faults_here(0)[0][1]
