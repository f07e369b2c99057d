"""Where ranks of one machine find each other: on its loopback interface, which no other machine reaches.

torch's own rendezvous listens on all addresses, and whoever reaches it can set the keys by which ranks find each other.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

_LOOPBACK = "127.0.0.1"
_INTERFACES = ("lo", "lo0")  # the loopback interface of Linux and of macOS
_INTERFACE_SETTINGS = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")


def are_on_one_machine(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the launcher says that there are several ranks, all on this machine."""
    count = environment.get("WORLD_SIZE", "1")
    return count not in ("", "1") and environment.get("LOCAL_WORLD_SIZE") == count


def stay_inside() -> None:
    """Make NCCL and Gloo listen on the loopback interface, unless the user has chosen an interface for one of them."""
    loopback = next((name for _, name in socket.if_nameindex() if name in _INTERFACES), None)
    if loopback and not any(os.environ.get(name) for name in _INTERFACE_SETTINGS):
        os.environ |= dict.fromkeys(_INTERFACE_SETTINGS, loopback)


def join_inside(backend: str, timeout: timedelta | None) -> None:
    """Make the process group of ranks on one machine. All ranks.

    Under torchrun its own agent holds the store, and decides where that listens.

    Args:
        backend: the backend of the default group.
        timeout: that of its collectives; None: Gloo's default.
    """
    timeout = timeout or default_pg_timeout
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        dist.init_process_group(backend, timeout=timeout)
        return
    rank, ranks, port = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    listener = _listener(port) if rank == 0 else None
    store = dist.TCPStore(
        _LOOPBACK,
        port,
        ranks,
        is_master=rank == 0,
        master_listen_fd=listener.detach() if listener else None,  # the store closes it
        timeout=timeout,
    )
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=timeout)


def _listener(port: int) -> socket.socket:
    """Return a socket that listens on the loopback interface alone."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((_LOOPBACK, port))
        listener.listen(socket.SOMAXCONN)
    except OSError as error:
        listener.close()
        raise OSError(error.errno, f"MASTER_PORT={port} can't be listened on: {error.strerror}") from error
    return listener
