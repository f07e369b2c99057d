"""The texts that configure the cluster of `slurm_cluster`: slurm.conf, /etc/hosts, and the script that a node runs."""

from __future__ import annotations

import os
import pwd
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SLURMD_PORT = 16818
"""Where each node's slurmd listens, where nodes have addresses of their own."""


@dataclass(frozen=True)
class Place:
    """The host name, address and port of a daemon."""

    name: str
    address: str
    port: int


def hostname() -> str:
    """Return this machine's host name in the form that slurmctld compares it with."""
    return socket.gethostname().split(".")[0]


def slurm_conf(
    folder: Path,
    controller: Place,
    nodes: Sequence[Place],
    *,
    cpus: int,
    memory_mb: int,
    grace_seconds: int,
    user_signal: bool,
    own_hosts: bool,
    extra: str,
) -> str:
    """Return the text of slurm.conf.

    A key that the installed SLURM does not know breaks every command, so no key here is newer than 22.05.

    Args:
        folder: folder for state, sockets and logs.
        controller: where slurmctld listens.
        nodes: where the slurmds listen.
        cpus: CPUs of each node; this machine may have fewer.
        memory_mb: memory of each node; this machine may have less.
        grace_seconds: grace period of a preempted job in `main`.
        user_signal: preempted jobs get the signal of their --signal option instead of SIGTERM.
        own_hosts: each node is a host; otherwise all share this machine's name.
        extra: further lines.
    """
    host = "" if own_hosts else f"NodeHostname={controller.name} "
    lines = [
        _CONF.format(folder=folder, user=pwd.getpwuid(os.geteuid()).pw_name, c=controller, per_cpu=memory_mb // cpus),
        "SlurmctldParameters=preempt_send_user_signal" if user_signal else "",
        *(
            f"NodeName={n.name} {host}NodeAddr={n.address} Port={n.port} CPUs={cpus} RealMemory={memory_mb}"
            for n in nodes
        ),
        _PARTITIONS.format(grace=grace_seconds),
        extra,
    ]
    return "\n".join(line for line in lines if line) + "\n"


# The plugins linuxproc, none and none need no cgroups; therefore memory is not limited and CPUs are not bound.
# A requeued job also waits for cred_expire before it may start; values below 5 count as 120.
# ReturnToService=1 keeps a node DOWN that was set DOWN. With 2 it would return at once, with the job's old processes.
# The scheduler runs every second and after each change. The end of a preempted job's grace period is noticed later:
# when SLURM retries the preemption, every KillWait + MessageTimeout = 15 s, or at the next check of time limits.
# Therefore a grace period of 8 s lasts 15 s, and one of 20 s lasts 26 s.
_CONF = """\
ClusterName=test
SlurmctldHost={c.name}({c.address})
SlurmctldPort={c.port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/%n.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
MailProg=/bin/true
KillWait=5
SlurmdTimeout=15
InactiveLimit=0
MinJobAge=3600
OverTimeLimit=0
UnkillableStepTimeout=30
ReturnToService=1
TreeWidth=64
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000,sched_interval=1,bf_interval=2,bf_yield_interval=100000
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU={per_cpu}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none"""

_PARTITIONS = """\
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace}
PartitionName=nograce Nodes=ALL MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=0
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF"""

# slurmd looks for a cgroup file system even if no plugin needs one, and exits if there is none, unless v1 is named.
CGROUP_CONF = "CgroupPlugin=cgroup/v1\n"

# The first process of a node. It waits for a line that says its network is up; each further line starts a slurmd.
# At the end of its input, which also comes when the parent is killed, it exits, and every process on the node with it.
# As it is bash, it reaps the processes that slurmd leaves behind.
NODE = """\
folder=$1 name=$2 address=$3
hostname "$name"
mount -t tmpfs -o size=1g tmpfs /dev/shm
mount --bind "$folder/hosts" /etc/hosts
mount --bind "$folder/nsswitch.conf" /etc/nsswitch.conf
echo on
read -r
ip link set lo up
ip address add "$address/24" dev eth0
ip link set eth0 up
while read -r; do
  slurmd -D -N "$name" </dev/null &
done
"""


def hosts(places: Sequence[Place]) -> str:
    """Return a node's /etc/hosts. In this machine's file its name is 127.0.0.1, which is the node itself on a node."""
    return "127.0.0.1 localhost\n" + "".join(f"{place.address} {place.name}\n" for place in places)


def nsswitch() -> str:
    """Return a node's nsswitch.conf without DNS: no name server answers there, and a look-up would take 20 s."""
    path = Path("/etc/nsswitch.conf")
    text = path.read_text() if path.exists() else ""
    return re.sub(r"(?m)^hosts:.*\n?", "", text) + "hosts: files\n"
