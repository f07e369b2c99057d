"""Gloo's interface is NCCL's where NCCL's setting names one, and its connections are made when they are used."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.trainer import rank_processes
from trainer.ranks import collective, gloo
from trainer.ranks.parallel import Parallel
from trainer.recipes.parallel import ParallelConfig

RANKS = 8


@pytest.fixture(autouse=True)
def interfaces(monkeypatch):
    """A machine with three interfaces; the environment is put back afterwards."""
    monkeypatch.setattr(gloo.socket, "if_nameindex", lambda: [(1, "lo"), (2, "eth0"), (3, "ib0")])
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "TORCH_GLOO_LAZY_INIT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("of_nccl", "of_gloo"),
    [
        ("ib0", "ib0"),
        ("=eth0", "eth0"),
        *((value, None) for value in ("", "eth", "^lo", "^=lo", "eth0,ib0", "=", "ib1")),
    ],
)
def test_gloo_takes_the_interface_of_nccl(monkeypatch, of_nccl, of_gloo):
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", of_nccl)
    gloo.prepare_gloo(2)
    assert os.environ.get("GLOO_SOCKET_IFNAME") == of_gloo


def test_without_a_setting_of_nccl_gloo_chooses():
    gloo.prepare_gloo(2)
    assert "GLOO_SOCKET_IFNAME" not in os.environ


def test_what_the_user_has_set_stays(monkeypatch):
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    monkeypatch.setenv("TORCH_GLOO_LAZY_INIT", "0")
    gloo.prepare_gloo(1024)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth0"
    assert os.environ["TORCH_GLOO_LAZY_INIT"] == "0"


@pytest.mark.parametrize(("ranks", "lazily"), [(1, None), (128, None), (129, "1"), (1024, "1")])
def test_many_ranks_connect_when_they_exchange_something(ranks, lazily):
    gloo.prepare_gloo(ranks)
    assert os.environ.get("TORCH_GLOO_LAZY_INIT") == lazily


def sockets() -> int:
    links = [path.readlink() for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    return sum(bool(re.match(r"socket:", str(link))) for link in links)


def eight_ranks(rank: int, root: str) -> None:
    os.environ["TORCH_GLOO_LAZY_INIT"] = "1"
    Parallel(ParallelConfig(device="cpu"))
    before = sockets()
    group = dist.new_group(backend="gloo")
    total = torch.tensor([float(rank)])
    dist.all_reduce(total, group=group)
    everybody = collective.gather(rank, group)
    if rank == RANKS - 1:
        dist.send(total, 0, group)
    elif rank == 0:
        dist.recv(total, RANKS - 1, group)
    assert total.item() == sum(range(RANKS))
    assert everybody == list(range(RANKS))
    (Path(root) / f"rank_{rank}").write_text(str(sockets() - before))
    while rank == 0 and len(list(Path(root).glob("rank_*"))) < RANKS:
        time.sleep(0.05)  # rank 0 holds the store by which the others find each other


def test_a_group_of_eight_ranks_does_not_connect_all_with_all(tmp_path):
    assert rank_processes.run(eight_ranks, RANKS, str(tmp_path)) == [0] * RANKS
    opened = [int((tmp_path / f"rank_{rank}").read_text()) for rank in range(RANKS)]
    assert max(opened) < RANKS - 1
