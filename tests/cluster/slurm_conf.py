"""What the cluster of `slurm_cluster` is made of, as text: slurm.conf, the names of its hosts, what a node does."""

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
    """Where a daemon listens."""

    name: str
    address: str
    port: int


def hostname() -> str:
    """Of this machine, as slurmctld compares it."""
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
    """The whole of slurm.conf. A key that this SLURM does not know breaks every command, hence none newer than 22.05.

    Args:
        folder: for state, sockets and logs.
        controller: where slurmctld listens.
        nodes: where the slurmds do.
        cpus: of each node; may be more than there are.
        memory_mb: of each node; may be more than there is.
        grace_seconds: that a preempted job in `main` has.
        user_signal: preempted jobs get the signal that they asked for with --signal, instead of SIGTERM.
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


# linuxproc, none, none: nothing that would need cgroups, so memory is not limited and CPUs are not bound.
# cred_expire is also how long a requeued job waits before it may start; less than 5 counts as 120.
# ReturnToService=1: a node that was set DOWN stays so; with 2 it would be back at once, beside the job's old processes.
# The scheduler looks every second, and whenever something changes. The end of a preempted job's grace is seen later:
# when preemption is tried again for the same job, every KillWait + MessageTimeout = 15 s, or at the next look at time
# limits. So a grace of 8 s lasts 15, and one of 20 lasts 26.
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

# slurmd looks for a cgroup file system even if it is to use none, and ends where there is none; v1 named, it does not.
CGROUP_CONF = "CgroupPlugin=cgroup/v1\n"

# The first process of a node. It waits until its network cable is in; then each line that it reads starts a slurmd, and
# at the end of its input, also that of a parent that was killed, it ends, and everything on the node with it. Being
# bash, it reaps what slurmd leaves behind.
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
    """A node's /etc/hosts. This machine's own has its name at 127.0.0.1, which is somebody else on a node."""
    return "127.0.0.1 localhost\n" + "".join(f"{place.address} {place.name}\n" for place in places)


def nsswitch() -> str:
    """A node's nsswitch.conf: no name server answers there, and one look-up would wait for it for 20 s."""
    path = Path("/etc/nsswitch.conf")
    text = path.read_text() if path.exists() else ""
    return re.sub(r"(?m)^hosts:.*\n?", "", text) + "hosts: files\n"
