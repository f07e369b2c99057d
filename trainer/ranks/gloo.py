"""Settings of Gloo, which ranks on CPUs use for everything, and ranks on GPUs for saving checkpoints."""

from __future__ import annotations

import os
import socket

MOST_CONNECTED = 128
"""Ranks up to which each rank connects to each other one when a group is made."""


def prepare_gloo(ranks: int) -> None:
    """Set the environment that Gloo reads when a group of `ranks` is made; what the user has set stays.

    * Many ranks connect when they first exchange something: a rank then has the connections of a ring and a tree, not
      one to each other rank in each group. Few ranks connect at once, so that a rank that is gone is noticed at once.
    * The interface is that of NCCL, if NCCL's setting names one of this machine. NCCL also takes beginnings of names,
      lists of names, and names to avoid, which Gloo does not understand.
    """
    if ranks > MOST_CONNECTED:
        os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    name = os.environ.get("NCCL_SOCKET_IFNAME", "").removeprefix("=")
    if name in {interface for _, interface in socket.if_nameindex()}:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
