"""The nodes of `slurm_cluster`: hosts made of Linux namespaces, or slurmds on this machine with a port each."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.cluster import slurm_conf
from tests.cluster.slurm_conf import Place
from tests.system_packages import PATH

_BOOT = 3.0  # seconds that a host is off at least; the controller would not notice a boot within the same second
_COUNTER = itertools.count()
_NAMESPACES = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]

# Waits until this process closes the pipe or dies, and then kills the jobs of a cluster whose nodes are not hosts,
# which nothing else would end. It recognises the jobs by their environment.
_WATCH = """\
read -r line
while
  jobs=$(grep -lzxF "SLURM_CONF=$1/slurm.conf" /proc/[0-9]*/environ | xargs -r grep -lz ^SLURMD_NODENAME= | cut -d/ -f3)
  [ "$jobs" ]
do
  kill -KILL $jobs
  sleep 0.1
done
rm -rf "$1"
"""


class ClusterError(RuntimeError):
    """A command to the cluster failed, or the cluster did not reach a state in time."""


def run(*command: str, text: str = "", timeout: float = 20, environment: Mapping[str, str] | None = None) -> str:
    """Run a command with `text` as its input and return its output.

    Raises:
        ClusterError: the command failed (with its message) or took too long.
    """
    said: dict[str, Any] = {"input": text, "capture_output": True, "text": True, "timeout": timeout}
    try:
        done = subprocess.run(command, env={**os.environ, "PATH": PATH, **(environment or {})}, **said)
    except subprocess.TimeoutExpired:
        raise ClusterError(f"no answer in {timeout:.0f} s from: {' '.join(command)}") from None
    if done.returncode:
        problem = done.stderr.strip() or done.stdout.strip()
        raise ClusterError(f"{' '.join(command)} failed with {done.returncode}: {problem}")
    return done.stdout


def start(*command: str, log: Path, environment: Mapping[str, str], **options: Any) -> subprocess.Popen[bytes]:
    """Start a daemon in a session of its own, so that the Ctrl-C that ends the tests does not end it first."""
    program = shutil.which(command[0], path=PATH) or command[0]
    with log.open("ab") as errors:
        given: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": errors, "stderr": errors} | options
        given["start_new_session"] = True
        return subprocess.Popen([program, *command[1:]], env={**environment, "PATH": PATH}, **given)


def start_bound(*command: str, **options: Any) -> subprocess.Popen[bytes]:
    """Start a daemon that dies with this process, even if this is killed.

    The daemon dies with the thread that starts it, so the main thread must call this.
    """
    return start("setpriv", "--pdeathsig", "KILL", *command, **options)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Kill a daemon that `start` started, with all processes of its session."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(10)


def watch(folder: Path) -> Callable[[], None]:
    """Return a function that removes a stopped cluster's folder; that also happens if this process is killed."""
    process = start("sh", "-c", _WATCH, "sh", str(folder), log=Path(os.devnull), environment={}, stdin=subprocess.PIPE)
    return lambda: _close(process)


def _close(process: subprocess.Popen[bytes]) -> None:
    process.communicate(b"\n", timeout=20)


def until(condition: Callable[[], Any], timeout: float, what: str) -> Any:
    """Poll a condition until its value is true and return the value. Raises ClusterError after the timeout."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise ClusterError(f"waited {timeout:.0f} s for {what}")
        time.sleep(0.02)
    return value


def processes() -> Iterator[int]:
    """Yield the PIDs of running processes. Zombies are left out, as a container's first process may never reap them."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and _read(entry / "stat").rpartition(")")[2].split()[:1] not in ([], ["Z"], ["X"]):
            yield int(entry.name)


@functools.cache
def _own_clock() -> bool:
    """Whether a host made of namespaces can have an uptime of its own."""
    try:
        run(*_NAMESPACES, "--time", "true")
    except ClusterError:
        return False
    return True


@functools.cache
def namespaces_refused() -> str:
    """Return why nodes cannot be hosts of their own on this machine; an empty string if they can."""
    if os.geteuid() != 0:
        return "not root"
    try:
        run(*_NAMESPACES, "ip", "link", "add", "probe", "type", "bridge")
    except (ClusterError, OSError) as error:
        return str(error)
    return ""


def free_port() -> int:
    """Return a free port below the range of outgoing connections, which might take the port before its use."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
                return port
            except OSError:
                continue


class Network:
    """A virtual switch and this machine's cable to it.

    The switch is in a network namespace of its own, so this machine's firewall does not apply to it, and when the
    switch's process ends, the kernel removes the switch and all cables.
    """

    def __init__(self, log: Path):
        self.subnet = self._free_subnet()
        self.address = f"{self.subnet}.254"
        self._cable = f"sl{os.getpid()}x{next(_COUNTER)}"
        holder = ["unshare", "--net", "sh", "-c", "echo on; exec sleep infinity"]
        self._switch = start_bound(*holder, log=log, environment={}, stdout=subprocess.PIPE)
        assert self._switch.stdout
        self._switch.stdout.readline()
        try:
            self._lay_cable()
        except BaseException:
            self.close()
            raise

    def _lay_cable(self) -> None:
        self._ip("link add switch type bridge", "link set switch up")
        run("ip", "link", "add", self._cable, "type", "veth", "peer", "name", "host", "netns", str(self._switch.pid))
        run("ip", "address", "add", f"{self.address}/24", "dev", self._cable)
        run("ip", "link", "set", self._cable, "up")
        self._ip("link set host master switch up")

    def plug(self, name: str, pid: int) -> None:
        """Connect the network namespace of a process to the switch; the interface there is eth0."""
        self._ip(f"link add {name} type veth peer name eth0 netns {pid}", f"link set {name} master switch up")

    def unplug(self, name: str) -> None:
        """Remove a node's cable."""
        self._ip(f"link delete {name}")

    def link(self, name: str, state: str) -> None:
        """Set a node's cable `down` or `up`."""
        self._ip(f"link set {name} {state}")

    def close(self) -> None:
        """Remove the switch and all cables."""
        stop(self._switch)
        assert self._switch.stdout
        self._switch.stdout.close()
        with contextlib.suppress(ClusterError):  # the kernel removes the cable too, but later
            run("ip", "link", "delete", self._cable)

    def _ip(self, *lines: str) -> None:
        target = f"--net=/proc/{self._switch.pid}/ns/net"
        run("nsenter", target, "ip", "-batch", "-", text="\n".join(lines) + "\n")

    def _free_subnet(self) -> str:
        """Return an unused /24 of 198.18.0.0/15, the range that is reserved for network tests."""
        taken = run("ip", "-4", "-oneline", "address") + run("ip", "-4", "route")
        every = [f"198.{a}.{b}" for a in (18, 19) for b in range(256)]
        return random.SystemRandom().choice([subnet for subnet in every if f"{subnet}." not in taken])


class HostNode:
    """A node with network, host name, processes and /dev/shm of its own."""

    def __init__(self, place: Place, folder: Path, environment: Mapping[str, str], network: Network):
        self.name, self._place, self._folder, self._network = place.name, place, folder, network
        self._environment, self._off_at = environment, -_BOOT
        self._power: subprocess.Popen[bytes] | None = None

    def boot(self) -> None:
        """Switch the node on if it is off, and start its slurmd."""
        if self._power is None or self._power.poll() is not None:
            time.sleep(max(0.0, self._off_at + _BOOT - time.monotonic()))
            self._switch_on()
        assert self._power
        assert self._power.stdin
        self._power.stdin.write(b"\n")

    def processes(self) -> list[int]:
        """Return the PIDs of the node's processes."""
        if self._power is None or self._power.poll() is not None:
            return []
        space = _namespace(self._power.pid, "pid_for_children")
        return [pid for pid in processes() if _namespace(pid, "pid") == space]

    def cut_power(self) -> None:
        """Remove the cable and kill everything on the node, so that other hosts never see its connections close."""
        if self._power is None or self._power.poll() is not None:
            return
        self._network.unplug(self.name)
        self.stop()
        self._off_at = time.monotonic()

    def stop(self) -> None:
        """Kill the node's processes."""
        if self._power is None:
            return
        _kill_all(self.processes())  # when the first of them dies, the kernel kills the others
        self._power.wait(10)
        for pipe in (self._power.stdin, self._power.stdout):
            assert pipe
            pipe.close()
        self._power = None

    def _switch_on(self) -> None:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
        init = ["bash", "-c", slurm_conf.NODE, "init", str(self._folder), self.name, self._place.address]
        log = self._folder / "log" / f"{self.name}.err"
        now = _read(Path("/proc/uptime")).partition(".")[0]
        clock = (
            ["--time", "--boottime", f"-{now}"] if _own_clock() else []
        )  # the controller detects a boot by the uptime
        power = start(*_NAMESPACES, *clock, *init, log=log, environment=self._environment, **pipes)
        self._power = power  # set before anything can fail, so that `stop` kills the process
        assert power.stdin
        assert power.stdout
        if not power.stdout.readline():
            raise ClusterError(f"{self.name} does not come up: {log.read_text()}")
        self._network.plug(self.name, power.pid)
        power.stdin.write(b"\n")


class PortNode:
    """A node that is a slurmd on this machine, next to the slurmds of the other nodes."""

    def __init__(self, place: Place, folder: Path, environment: Mapping[str, str]):
        self.name, self._folder = place.name, folder
        self._environment = {
            **environment,
            "SLURMD_NODENAME": self.name,
        }  # marks the slurmd like its tasks, for `processes`
        self._slurmd: subprocess.Popen[bytes] | None = None

    def boot(self) -> None:
        """Start the node's slurmd if it does not run."""
        if self._slurmd is None or self._slurmd.poll() is not None:
            log = self._folder / "log" / f"{self.name}.err"
            self._slurmd = start_bound("slurmd", "-D", "-N", self.name, log=log, environment=self._environment)

    def processes(self) -> list[int]:
        """Return the PIDs of slurmd, slurmstepds and tasks, found by their environment, and of all descendants."""
        wanted = {f"SLURMD_NODENAME={self.name}", f"SLURM_CONF={self._environment['SLURM_CONF']}"}
        everything = {pid: _parent(pid) for pid in processes()}
        mine = {pid for pid in everything if wanted <= set(_read(Path(f"/proc/{pid}/environ")).split("\0"))}
        while more := {pid for pid, parent in everything.items() if parent in mine} - mine:
            mine |= more
        return sorted(mine - {os.getpid()})

    def cut_power(self) -> None:
        """Kill everything on the node. Unlike in a real power cut this machine's kernel closes the connections."""
        self.stop()

    def stop(self) -> None:
        """Kill the node's processes until none is left, as a dying slurmd may start one more process."""
        until(lambda: not _kill_all(self.processes()), 10, f"the end of {self.name}'s processes")
        if self._slurmd is not None:
            self._slurmd.wait(10)


Node = HostNode | PortNode


def slurmds(node: Node) -> list[int]:
    """Return the PIDs of a node's slurmd and of its forks that have not yet executed another program."""
    return [pid for pid in node.processes() if _read(Path(f"/proc/{pid}/comm")).strip() == "slurmd"]


def kill_slurmd(node: Node) -> None:
    """Kill a node's slurmd and none of the jobs on the node."""
    until(lambda: not _kill_all(slurmds(node)), 10, f"the end of {node.name}'s slurmd")


def _parent(pid: int) -> int:
    fields = _read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
    return int(fields[1]) if fields else 0


def _namespace(pid: int, kind: str) -> str:
    try:
        return str(Path(f"/proc/{pid}/ns/{kind}").readlink())
    except OSError:
        return ""


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:  # the process is gone, or belongs to another user
        return ""


def _kill_all(pids: list[int]) -> list[int]:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return pids
