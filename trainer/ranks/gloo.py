"""Settings of Gloo, which ranks on CPUs use for everything, and ranks on GPUs for saving checkpoints."""

from __future__ import annotations

import os
import socket


def prepare_gloo() -> None:
    """Set the environment that Gloo reads when a group is made; what the user has set stays.

    * Connections are made when they are first used: a rank then has those of a ring and a tree, not one to each other
      rank in each group.
    * The interface is that of NCCL, if NCCL's setting names one of this machine. NCCL also takes beginnings of names,
      lists of names, and names to avoid, which Gloo does not understand.
    """
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    name = os.environ.get("NCCL_SOCKET_IFNAME", "").removeprefix("=")
    if name in {interface for _, interface in socket.if_nameindex()}:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
