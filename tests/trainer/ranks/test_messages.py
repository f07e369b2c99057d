"""What ranks send each other arrives as it was, is never a pickle, and is refused if it is none of ours."""

from __future__ import annotations

import json
import math
import os
import pickle
import random
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import pytest
import torch.distributed as dist

from tests.damage import VALUES
from tests.trainer import rank_processes
from trainer.ranks import collective, messages, rendezvous
from trainer.ranks.parallel import Parallel
from trainer.recipes.parallel import ParallelConfig


class Pair(NamedTuple):
    one: int
    two: str


PLAIN = [
    None, True, 0, -1, 2**64 - 1, 1e308, math.inf, "", "é\ud800\0", Path("/a b/\udcff"), [], (), {}, (1, (2, [3])),
    {"tuple": [1], "path": "x"}, {"path": Path("x")}, [{"table": {}}, ("",)], {"a": (0, 2**40)},
]  # fmt: skip


@pytest.mark.parametrize("value", PLAIN)
def test_a_value_arrives_as_it_was(value):
    arrived = messages.decode(messages.encode(value))
    assert arrived == value
    assert type(arrived) is type(value)


def test_a_named_tuple_arrives_as_a_tuple():
    assert messages.decode(messages.encode([Pair(1, "a")])) == [(1, "a")]


@pytest.mark.parametrize("value", [b"x", {1: 2}, {1, 2}, object(), 1j, Pair])
def test_other_types_are_refused_where_they_are_sent(value):
    with pytest.raises(TypeError, match="can't send"):
        messages.encode([value])


def strange(chance: random.Random) -> bytes:
    """Return bytes that no rank sends."""
    of_ours = bytearray(messages.encode(chance.choice(PLAIN)))
    way = chance.randrange(5)
    if way == 0:
        return pickle.dumps(chance.choice(VALUES[:10]), protocol=chance.randrange(6))
    if way == 1:
        return json.dumps({chance.choice(("tuple", "path", "table", "", "x")): chance.choice(VALUES)}).encode()
    if way == 2:
        return chance.choice((b"[", b'{"tuple": [')) * 100_000
    of_ours[chance.randrange(len(of_ours)) :] = chance.randbytes(chance.randrange(20))
    return bytes(of_ours)


def test_strange_bytes_are_a_value_or_an_error_of_one_line():
    chance, refused = random.Random(0), 0
    for _ in range(500):
        try:
            messages.decode(strange(chance))
        except ValueError:
            refused += 1
    assert refused > 250


# --- two ranks --------------------------------------------------------------------------------------------------------


def exchanged(rank: int) -> None:
    Parallel(ParallelConfig(device="cpu"), timeout=timedelta(seconds=60))
    if rank == 0:
        with pytest.raises(AssertionError, match="a rank pickles"):
            dist.broadcast_object_list([1], 0)  # `tests.trainer.preloaded` sees to this in all tests of ranks
    mine = {"rank": rank, "path": Path(f"/{rank}"), "long": "é" * (10 + 1000 * rank)}
    of_ranks = collective.gather(mine)
    assert [value["rank"] for value in of_ranks] == [0, 1]
    assert of_ranks[rank] == mine
    assert collective.on_rank_0(lambda: mine)["path"] == Path("/0")
    collected = collective.collect(mine, senders=[0, 1], receiver=1)
    assert [value["rank"] for value in collected] == [0, 1][: 2 * rank]
    assert collective.together(lambda: rank) == [0, 1]
    with pytest.raises(OSError, match=r"rank 1: .*gone") as caught:
        collective.together(lambda: _fail_on(1, rank))
    assert caught.value.errno == 5
    with pytest.raises(OSError, match="gone"):
        collective.on_rank_0(lambda: _fail_on(0, rank))


def _fail_on(failing: int, rank: int) -> None:
    if rank == failing:
        raise OSError(5, "gone")


def test_ranks_exchange_no_pickles():
    assert rank_processes.run(exchanged, 2) == [0, 0]


def listens_inside(rank: int, port_file: str) -> None:
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        os.environ.pop(name, None)
    Parallel(ParallelConfig(device="cpu"), timeout=timedelta(seconds=60))
    collective.gather(rank)
    collective.own_group()
    addresses = [line.split()[1].partition(":")[0] for line in _listening_here()]
    assert addresses
    assert set(addresses) == {"0100007F"}, addresses
    collective.gather(rank)


def _listening_here() -> list[str]:
    """Return the lines of this process's listening sockets in the kernel's tables."""
    mine = {path.readlink().name for path in Path("/proc/self/fd").iterdir() if path.is_symlink()}
    lines = [line for table in ("tcp", "tcp6") for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]]
    return [line for line in lines if line.split()[3] == "0A" and f"socket:[{line.split()[9]}]" in mine]


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="only Linux has these tables")
def test_ranks_of_one_machine_listen_on_its_loopback_interface_alone(tmp_path):
    assert rank_processes.run(listens_inside, 2, str(tmp_path)) == [0, 0]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}, False),
        ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, True),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, False),
        ({"WORLD_SIZE": "4"}, False),
    ],
)
def test_only_ranks_that_are_said_to_be_on_one_machine_stay_inside(environment, expected):
    assert rendezvous.are_on_one_machine(environment) is expected


@pytest.mark.parametrize("name", ["NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"])
def test_an_interface_that_the_user_names_stays(monkeypatch, name):
    for each in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setenv(name, "ib0")
    rendezvous.stay_inside()
    assert {os.environ.get("NCCL_SOCKET_IFNAME"), os.environ.get("GLOO_SOCKET_IFNAME")} == {"ib0", None}


def agreed(rank: int) -> None:
    Parallel(ParallelConfig(device="cpu"), timeout=timedelta(seconds=60))
    assert collective.gather(rank) == [0, 1]


AGREED = "from tests.trainer.ranks.test_messages import agreed; import os; agreed(int(os.environ['RANK'])); os._exit(0)"


@pytest.mark.slow
def test_ranks_of_torchrun_find_each_other_through_its_agent(tmp_path):
    (tmp_path / "agreed.py").write_text(AGREED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "agreed.py"]
    path = os.pathsep.join([str(Path(__file__).parents[3]), *sys.path])
    subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, check=True, timeout=300)
