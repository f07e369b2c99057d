"""The supervisor of a rank: imports all that a rank needs, forks the worker that trains, and restarts it in the job.

If a worker is killed or fails, the supervisors of all ranks end their workers and fork new ones, which resume from the
newest whole checkpoint: no queue, no import, no new allocation. Restarts go by the policy of requeues, and where
anything about the job is not whole (a supervisor or a node is lost, a rank was asked to leave, the agreement takes too
long), each supervisor ends with its worker's status, and the batch script decides as it would without supervisors.

A supervisor has one thread and never uses CUDA or a process group, so that a fork of it is a clean start. Its workers
die with it.
"""

from __future__ import annotations

import importlib
import os
import selectors
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from types import FrameType
from typing import NoReturn

from launch.rank_count import usable_ranks
from launch.signals import MISTAKE, SIGNALS, heeded
from launch.slurm import forked, worker
from launch.slurm.attempt import TOKEN, Attempt, Note, note_of
from launch.slurm.channel import Command
from launch.slurm.forked import Forked
from launch.slurm.links import PATIENCE, Chair, Link, Member
from launch.slurm.quiet_imports import quiet_imports
from launch.slurm.restart import begin_next
from launch.slurm.roll_call import FAILED, LEFT, ORDERED, RollCall
from launch.slurm.slurm_task import SlurmTask
from launch.slurm.variables import SUPERVISORS
from trainer.recipes.schema import Config

_IMPORTED = ("trainer.loop", "launch.pipeline", "torch._dynamo", "peft")
"""What a worker would import, most of it as it builds the model; it takes several times as long as torch alone."""
_IMPORTED_ON_RANK_0 = ("torch.utils.tensorboard",)
_TICK = 0.5  # seconds
Work = Callable[[str, Attempt, SlurmTask, Config, forked.Tell], NoReturn]
_LATER = 0.1  # fraction of health.hang_seconds within which the watchdogs of all ranks end them


def supervise(stage: str, attempt: Attempt, task: SlurmTask, config: Config) -> None:
    """Run a task of a trained stage to its end, and end the process; return if the task has to work by itself."""
    try:
        ranks, _ = usable_ranks(config, stage, task.count)
    except ValueError:  # the worker fails likewise, and leaves a note
        return
    if task.rank >= ranks:
        return
    supervisor = Supervisor(stage, attempt, task, config, ranks=ranks)
    _import_all((*_IMPORTED, *(() if task.rank else _IMPORTED_ON_RANK_0)))
    try:
        forked.require_forkable()
    except RuntimeError as error:
        print(f"spresso: rank {task.rank} can't be restarted in the job: {error}", file=sys.stderr)
        supervisor.step_aside()
        return
    status = supervisor.run()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _import_all(names: Iterable[str]) -> None:
    with quiet_imports():
        for name in names:
            with suppress(Exception):  # the worker fails likewise, and leaves a note
                importlib.import_module(name)


class Supervisor:
    """One task's supervisor, from the task's start to its end."""

    def __init__(
        self, stage: str, attempt: Attempt, task: SlurmTask, config: Config, *, ranks: int, work: Work = worker.work
    ) -> None:
        """Watch for signals, and listen if this is the first supervisor: the others import as long."""
        self.stage, self.attempt, self.task, self.config, self.ranks = stage, attempt, task, config, ranks
        self._work = work
        self.most = config.cluster.of(stage).restarts_in_job
        self.status: int | None = None
        """Exit status of the task, once that is known."""
        self._worker: Forked | None = None
        self._last = 0
        """Exit status of the last worker, as a shell gives it."""
        self._asked: list[int] = []
        """Signals that have asked this task to leave."""
        self._kill_at = self._give_up_at = float("inf")
        self._selector = selectors.DefaultSelector()
        self._woken, self._waker = os.pipe()
        for end in (self._woken, self._waker):
            os.set_blocking(end, False)
        self._selector.register(self._woken, selectors.EVENT_READ, lambda: os.read(self._woken, 4096))
        watched = (*heeded(SIGNALS), signal.SIGCHLD)
        self._before = {number: signal.signal(number, self._handle) for number in watched}
        signal.set_wakeup_fd(self._waker, warn_on_full_buffer=False)
        self._link = self._make_link()

    def _make_link(self) -> Link | None:
        if SUPERVISORS not in os.environ:  # a script of an older version
            return None
        port = int(os.environ[SUPERVISORS])
        if self.task.rank:
            return Member(self._selector, self.attempt, (os.environ["MASTER_ADDR"], port), self.task.rank)
        try:
            return Chair(self._selector, self.attempt, port, count=self.ranks, restart=self._next)
        except OSError as error:
            print(f"spresso: no restarts in the job: port {port}: {error.strerror}", file=sys.stderr)
            return None

    def step_aside(self) -> None:
        """Leave signals and connections to the worker, which this process itself becomes.

        Signals wait until the worker lets them through to handlers of its own. Those that another thread takes, one of
        a package's, are handed to this one.
        """
        me, asking = threading.get_ident(), self._before.keys() - {signal.SIGCHLD}
        signal.pthread_sigmask(signal.SIG_BLOCK, asking)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, self._before[signal.SIGCHLD])
        for number in asking:
            signal.signal(number, lambda number, frame: signal.pthread_kill(me, number))
        self._selector.close()
        os.close(self._woken)
        os.close(self._waker)
        if self._link is not None:
            self._link.close()
        for asked in self._asked:
            signal.pthread_kill(me, asked)

    def run(self) -> int:
        """Run workers until the task has ended; return its exit status."""
        if self._link is not None:
            self._link.tick()  # the chair has been listening since before it imported anything
        self._begin(None)
        while self.status is None:
            self._wait()
            self._look_at_worker()
            if self._link is not None:
                self._link.tick()
            self._follow_orders()
            if self._link is None or not self._link.stands or time.monotonic() > self._give_up_at:
                self._end_with_worker()
        if self._worker is not None:
            self._worker.kill()
        return self.status

    def _wait(self) -> None:
        """Wait until something has happened, or for a moment."""
        left = _TICK if self._worker is None else self._kill_at - time.monotonic()
        for key, _ in self._selector.select(max(0.0, min(_TICK, left))):
            key.data()
        if time.monotonic() >= self._kill_at and self._worker is not None:
            self._worker.kill()
            self._kill_at = float("inf")

    def _begin(self, port: int | None) -> None:
        """Fork a worker of the current attempt; `port`: MASTER_PORT, if it is not the first worker."""
        os.environ[TOKEN] = self.attempt.token
        if port is not None:
            os.environ["MASTER_PORT"] = str(port)
        self._kill_at = self._give_up_at = float("inf")

        def work(tell: forked.Tell) -> NoReturn:
            self._work(self.stage, self.attempt, self.task, self.config, tell)

        self._worker = forked.fork(work, close=self._own_descriptors())
        for number in self._asked:
            self._forward(number)

    def _look_at_worker(self) -> None:
        """Find out whether the worker has ended, and tell the chair."""
        if self._worker is None or (code := self._worker.poll()) is None:
            self._reap_others()
            return
        ended, self._worker = self._worker, None
        said, self._last = ended.said(), code if code >= 0 else 128 - code
        if code in (0, MISTAKE):
            self.status = code
            self._tell(LEFT)
        elif ended.killed and code == -signal.SIGKILL:
            self._last = 0  # another rank's status tells why srun's step has failed
            self._tell(ORDERED)
        else:
            self._tell_of_failure(code, said)
        self._give_up_at = time.monotonic() + 2 * PATIENCE

    def _tell_of_failure(self, code: int, said: Note | None) -> None:
        grace = 0.0
        if said is None:
            why = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code} and no note"
            grace = min(PATIENCE, max(1.0, _LATER * self.config.health.hang_seconds)) if code > 0 else 0.0
            said = self._note_of_killed(why)
        if self._asked:
            self._tell(LEFT)
            self.status = self._last
            return
        self._tell(FAILED, said, grace)

    def _note_of_killed(self, why: str) -> Note:
        note = note_of("killed", why=why)
        try:
            self.attempt.keep(self.task.rank, note)
        except OSError as error:
            print(f"spresso: rank {self.task.rank} {why}, but its note failed: {error}", file=sys.stderr)
        return Note(**note)  # type: ignore[typeddict-item]

    def _tell(self, kind: str, note: Note | None = None, grace: float = 0.0) -> None:
        if self._link is None:
            return
        ending = {"rank": self.task.rank, "generation": self.attempt.generation, "kind": kind, "grace": grace}
        self._link.tell(ending | ({} if note is None else {"note": note}))  # type: ignore[arg-type]

    def _follow_orders(self) -> None:
        while self._link is not None and self._link.orders and self.status is None:
            self._follow(self._link.orders.popleft())

    def _follow(self, order: Command) -> None:
        generation = order["generation"]
        if order["do"] == "over":
            self.status = self._last
        elif order["do"] == "end" and generation == self.attempt.generation:
            self._kill_at = time.monotonic() + order.get("grace", 0.0)
        elif order["do"] == "begin" and generation > self.attempt.generation and self._worker is None:
            self.attempt = replace(self.attempt, generation=generation)
            self._begin(order.get("port"))

    def _end_with_worker(self) -> None:
        """End with the last worker's status if no worker runs: nobody will order another one."""
        if self._worker is None and self.status is None:
            self.status = self._last

    def _next(self, roll: RollCall) -> tuple[Attempt, int] | None:
        """Make the next generation ready, as the first supervisor; None if no restart is left or allowed."""
        if self._asked or roll.generation >= self.most:
            return None
        return begin_next(self.attempt, roll.notes(), tasks=self.task.count)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGCHLD:
            return
        self._asked.append(number)
        self._forward(number)

    def _forward(self, number: int) -> None:
        """Pass a signal on to the worker. A task that has none has nothing to save."""
        if self._worker is not None:
            self._worker.signal(number)
        elif self._give_up_at != float("inf"):
            self._give_up_at = 0.0

    def _reap_others(self) -> None:
        """Wait for children that have ended and are no workers."""
        if self._worker is None:
            try:
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            except ChildProcessError:
                pass

    def _own_descriptors(self) -> list[int]:
        mine = [self._woken, self._waker, self._selector.fileno()]  # type: ignore[attr-defined]
        return mine + (self._link.descriptors() if self._link is not None else [])
