"""A real SLURM cluster of several nodes on this machine, which starts in a second and leaves nothing behind.

    with SlurmCluster(nodes=4) as cluster:
        job = cluster.submit("--nodes=2", "--wrap=srun hostname")
        cluster.wait_for(job, "COMPLETED", timeout=20)

As root with the needed capabilities, each node is a host of its own, with its own network, host name, processes and
/dev/shm. Otherwise all slurmds share this machine, with a port each. The cluster needs no systemd, no cgroups and
nothing in /etc, and any number of clusters can run at the same time.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from tests.cluster import slurm_conf
from tests.cluster.slurm_conf import Place
from tests.cluster.slurm_nodes import (
    ClusterError,
    HostNode,
    Network,
    Node,
    PortNode,
    free_port,
    kill_slurmd,
    namespaces_refused,
    run,
    slurmds,
    start_bound,
    stop,
    until,
    watch,
)

_PATIENCE = 20.0  # seconds for a command; one whose controller does not answer tries for nine
_TAIL = 25  # lines of each log


class SlurmCluster:
    """Nodes `node1`, `node2`, …, with the partitions `main` (default), `nograce`, and `high`, which preempts both.

    Jobs are requeued when they are preempted, after `grace_seconds` or up to 15 s more in `main`, and without grace in
    `nograce`. There is no accounting; the controller remembers jobs for an hour. A requeued job starts again after 6 s;
    a process that ignores SIGTERM is killed after 5; a silent node is DOWN after about 25.

    The controller checks time limits every 30 s, counted from its start, and no setting changes that. SLURM's shortest
    limit is a minute; `expire` makes a job's limit pass sooner.
    """

    def __init__(
        self,
        nodes: int = 4,
        cpus: int = 4,
        memory_mb: int = 4000,
        *,
        grace_seconds: int = 20,
        user_signal: bool = False,
        mode: str | None = None,
        extra_conf: str = "",
    ):
        """Set up the cluster; `with` starts it and must run in the main thread.

        Args:
            nodes: number of nodes.
            cpus: CPUs of each node; this machine may have fewer.
            memory_mb: memory of each node; this machine may have less.
            grace_seconds: seconds between the signal to a preempted job in `main` and its end.
            user_signal: send preempted jobs the signal of their --signal option instead of SIGTERM.
            mode: "netns" or "ports"; by default "netns" if this machine allows it.
            extra_conf: more lines for slurm.conf.
        """
        self.mode = mode or ("ports" if namespaces_refused() else "netns")
        self.names = [f"node{number}" for number in range(1, nodes + 1)]
        self._settings: dict[str, Any] = {"cpus": cpus, "memory_mb": memory_mb, "grace_seconds": grace_seconds}
        self._settings |= {"user_signal": user_signal, "extra": extra_conf, "own_hosts": self.mode == "netns"}
        self._down = ExitStack()

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables with which sbatch and the other commands find this cluster."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def __enter__(self) -> Self:
        try:
            self._up()
        except BaseException:
            self._down.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._down.close()

    def wait_ready(self, timeout: float = 30) -> None:
        """Wait until all nodes are idle. Raises ClusterError with the logs."""
        try:
            until(self._all_idle, timeout, f"{len(self.names)} idle nodes")
        except ClusterError as error:
            raise ClusterError(f"{error}\n{self.logs()}") from None

    def command(self, *command: str, timeout: float = _PATIENCE) -> str:
        """Run a command of SLURM and return its stripped output. Raises ClusterError if it fails or takes too long."""
        return run(*command, timeout=timeout, environment=self.environment).strip()

    def submit(self, *arguments: str) -> str:
        """Call sbatch with the arguments and return the job's id."""
        return self.command("sbatch", "--parsable", *arguments)

    def job(self, job_id: str) -> dict[str, str]:
        """Return the controller's record of a job, or of an array's first element. Raises ClusterError."""
        return _parse(self.command("scontrol", "--oneliner", "show", "job", job_id).splitlines()[0])

    def node(self, name: str) -> dict[str, str]:
        """Return the controller's record of a node: State, Reason …"""
        return _parse(self.command("scontrol", "--oneliner", "show", "node", name))

    def state(self, job_id: str) -> str:
        """Return a job's state: PENDING, RUNNING, COMPLETING, COMPLETED …"""
        return self.job(job_id)["JobState"]

    def wait_for(self, job_id: str, states: str | Collection[str], timeout: float = 60) -> dict[str, str]:
        """Wait until a job is in one of the states and return its record. Raises ClusterError with the logs."""
        wanted = {states} if isinstance(states, str) else set(states)
        last: dict[str, str] = {}

        def reached() -> bool:
            last.update(self.job(job_id))
            return last["JobState"] in wanted

        try:
            until(reached, timeout, f"job {job_id} to be {' or '.join(sorted(wanted))}")
        except ClusterError as error:
            raise ClusterError(f"{error}; it is {last.get('JobState')}: {last}\n{self.logs()}") from None
        return last

    def expire(self, job_id: str, seconds: int = 1) -> None:
        """Set a running job's time limit to `seconds` from now, even if it has none; SLURM checks it within 30 s.

        With at least 31 s, one check comes before the check that ends the job, and sends the signal of --signal.
        """
        self.command("scontrol", "update", f"JobId={job_id}", f"EndTime=now+{seconds}")

    def down_node(self, name: str) -> None:
        """Set a node DOWN: its jobs are requeued at once, and no job starts on it."""
        self.command("scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=test")

    def resume_node(self, name: str) -> None:
        """Undo `down_node`."""
        self.command("scontrol", "update", f"NodeName={name}", "State=RESUME")

    def cut_power(self, name: str) -> None:
        """Send SIGKILL to everything on a node."""
        self._nodes[name].cut_power()

    def processes(self, name: str) -> list[int]:
        """Return the PIDs, as this machine numbers them, of all processes on a node."""
        return self._nodes[name].processes()

    def kill_slurmd(self, name: str) -> None:
        """Send SIGKILL to a node's slurmd only; the jobs on the node keep running."""
        kill_slurmd(self._nodes[name])

    def boot(self, name: str) -> None:
        """Start a node again, or its slurmd if only that was killed, and wait until the controller has noticed.

        After a power cut the controller requeues the node's jobs and leaves the node DOWN as unexpectedly rebooted;
        this then resumes the node. In mode "ports" the controller cannot detect the reboot, as the uptime is this
        machine's. So wait there until it has noticed the power cut; otherwise it believes for another 100 s that the
        jobs are running.
        """
        if slurmds(self._nodes[name]):
            return
        began = int(time.time())
        self._nodes[name].boot()
        until(lambda: self._started(name) >= began, 20, f"{name} to register")
        if "rebooted" in self.node(name).get("Reason", ""):
            self.resume_node(name)

    def partition(self, name: str) -> None:
        """Cut a node off the network. Raises ClusterError in mode "ports", where nodes have no network of their own."""
        self._cables().link(name, "down")

    def heal(self, name: str) -> None:
        """Connect a node to the network again."""
        self._cables().link(name, "up")

    def logs(self) -> str:
        """Return the last lines of the daemons' logs."""
        return "\n".join(self._tails())

    def _up(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self._down.callback(watch(self.folder))
        for name in ("state", "log", *(f"spool/{node}" for node in self.names)):
            (self.folder / name).mkdir(parents=True)
        self._network = self._connect() if self.mode == "netns" else None
        self.address = self._network.address if self._network else "127.0.0.1"
        """This machine's address as the nodes see it."""
        controller = Place(slurm_conf.hostname(), self.address, free_port())
        places = [self._place(number) for number in range(1, len(self.names) + 1)]
        self._write_files(controller, places)
        self._start_munged()
        self._start_controller(controller)
        self._nodes = {place.name: self._make(place) for place in places}
        for node in self._nodes.values():
            self._down.callback(node.stop)
            node.boot()
        self.wait_ready()

    def _connect(self) -> Network:
        network = Network(self.folder / "log" / "network.err")
        self._down.callback(network.close)
        return network

    def _place(self, number: int) -> Place:
        if self._network is None:
            return Place(f"node{number}", "127.0.0.1", free_port())
        return Place(f"node{number}", f"{self._network.subnet}.{number}", slurm_conf.SLURMD_PORT)

    def _make(self, place: Place) -> Node:
        environment = {**_clean_environment(), **self.environment}
        if self._network is None:
            return PortNode(place, self.folder, environment)
        return HostNode(place, self.folder, environment, self._network)

    def _write_files(self, controller: Place, places: list[Place]) -> None:
        conf = slurm_conf.slurm_conf(self.folder, controller, places, **self._settings)
        files = {"slurm.conf": conf, "cgroup.conf": slurm_conf.CGROUP_CONF}
        files |= {"hosts": slurm_conf.hosts([controller, *places]), "nsswitch.conf": slurm_conf.nsswitch()}
        for name, text in files.items():
            (self.folder / name).write_text(text)
        (self.folder / "munge.key").write_bytes(os.urandom(1024))
        (self.folder / "munge.key").chmod(0o600)

    def _start_munged(self) -> None:
        files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid", "seed-file": "munge.seed"}
        options = [f"--{option}={self.folder / name}" for option, name in files.items()]
        # munged runs as root in a private folder only with --force; without --origin it looks up this host's address
        self._daemon("munged", "--foreground", "--force", "--origin=127.0.0.1", *options, log="munged.err")
        until(self._munge_answers, 10, "munged")

    def _munge_answers(self) -> bool:
        try:
            run("munge", "--no-input", f"--socket={self.folder / 'munge.socket'}", timeout=5)
        except ClusterError:
            return False
        return True

    def _start_controller(self, place: Place) -> None:
        process = self._daemon("slurmctld", "-D", log="slurmctld.err")

        def listening() -> bool:
            if process.poll() is not None:
                raise ClusterError(f"slurmctld ended with {process.returncode}\n{self.logs()}")
            with socket.socket() as probe:
                return probe.connect_ex((place.address, place.port)) == 0

        until(listening, 20, "slurmctld")

    def _daemon(self, *command: str, log: str) -> subprocess.Popen[bytes]:
        environment = {**_clean_environment(), **self.environment}
        process = start_bound(*command, log=self.folder / "log" / log, environment=environment)
        self._down.callback(stop, process)
        return process

    def _all_idle(self) -> bool:
        try:
            count = self.command(
                "sinfo", "--noheader", "--responding", "--partition=main", "--states=idle", "--format=%D", timeout=10
            )
        except ClusterError:
            return False
        return count == str(len(self.names))

    def _started(self, name: str) -> float:
        said = self.node(name).get("SlurmdStartTime", "None")
        return 0 if said == "None" else datetime.fromisoformat(said).timestamp()

    def _cables(self) -> Network:
        if self._network is None:
            raise ClusterError("nodes have no network of their own here")
        return self._network

    def _tails(self) -> Iterator[str]:
        for path in sorted((self.folder / "log").iterdir()):
            lines = path.read_text(errors="replace").splitlines()
            if lines and not (
                path.suffix == ".err" and path.with_suffix(".log").exists()
            ):  # the .log has the same lines
                yield f"--- {path.name}"
                yield from lines[-_TAIL:]


def _parse(line: str) -> dict[str, str]:
    return dict(re.findall(r"(\S+?)=(.*?)(?= +[\w:/]+=|$)", line))


def _clean_environment() -> dict[str, str]:
    """Return this process's environment without the variables of a surrounding SLURM job."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "SRUN"))}
