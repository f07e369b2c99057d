"""The batch script of a SLURM job: its options, its lines, and its submission through submitit.

submitit writes the head of the script and passes the script to sbatch. submitit's own runner is not used: it pickles a
function at submission, and it reacts to signals on one rank alone, from inside a signal handler. The tasks run
`launch.slurm.job_task` instead, and the run directory alone decides where a job resumes.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.slurm.slurm import SlurmExecutor

from launch.slurm.variables import GRACE, PARTS, RUN, SUBMISSION, TASKS_PER_NODE
from trainer.file_names import printable
from trainer.recipes.cluster import ClusterConfig, is_one_line, option_name
from trainer.stages import STAGES


class Job(SlurmExecutor):
    """One job, which runs one stage or several in order."""

    def __init__(
        self,
        cluster: ClusterConfig,
        stages: Sequence[str],
        *,
        name: str,
        run: Path,
        submission: Path,
        after: Sequence[str] = (),
    ) -> None:
        """Describe the job; SLURM is not contacted yet.

        Args:
            cluster: resources that the job requests.
            stages: stages to run, in this order.
            name: name of the run.
            run: absolute path of the run directory.
            submission: folder with the code and the config that the job uses, and the script.
            after: ids of the jobs that must succeed before this one starts.

        Raises:
            ValueError: the name or a path can't stand in a batch script.
        """
        require_writable(name, run)
        super().__init__(submission / "jobs")
        self.cluster, self.stages, self.run, self.submission = cluster, list(stages), run, submission
        self.elastic = cluster.least_nodes < cluster.most_nodes
        alone = len(self.stages) == 1 and STAGES[self.stages[0]].array
        self.array = cluster.array if alone and cluster.array > 1 else 0
        self.update_parameters(
            job_name=f"{name}.{self.stages[0]}" if len(self.stages) == 1 else name,
            nodes=cluster.nodes,
            ntasks_per_node=None if self.elastic else cluster.ranks_per_node,
            gpus_per_node=cluster.gpus_per_node or None,
            cpus_per_task=cluster.cpus_per_task,
            time=cluster.time,
            mem=cluster.mem,
            partition=cluster.partition,
            account=cluster.account,
            qos=cluster.qos,
            constraint=cluster.constraint,
            signal_delay_s=cluster.grace_seconds,
            wckey=None,
            stderr_to_stdout=True,
            use_srun=False,
            setup=self._setup(),
            additional_parameters=self._options(after),
        )

    @property
    def log(self) -> Path:
        """Path of the script's output, with the placeholders of sbatch."""
        stage = self.stages[0] if len(self.stages) == 1 else ""
        return self.run / stage / "logs" / ("job_%A_%a.out" if self.array else "job_%j.out")

    @property
    def text(self) -> str:
        """The batch script."""
        return self._make_submission_file_text(self._command, "")

    def hand_over(self) -> str:
        """Submit the script with sbatch; return the job id.

        Raises:
            ValueError: sbatch refuses the script, or is not installed.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.make_folders()
        try:
            return self._submit_command(self._command).job_id
        except (FailedJobError, FailedSubmissionError) as error:
            raise ValueError(f"sbatch refuses the job of {', '.join(self.stages)}: {error}") from None
        except FileNotFoundError:
            raise ValueError("there is no sbatch here: run this on a login node of the cluster") from None

    def make_folders(self) -> None:
        """Create the folders of the logs: SLURM creates none, and a job without them fails without a message."""
        for folder in (self.log.parent, *(self.run / stage / "logs" for stage in self.stages)):
            folder.mkdir(parents=True, exist_ok=True)

    @classmethod
    def affinity(cls) -> int:
        """Return that submitit may use this class, even on a machine without SLURM."""
        return 1

    def _num_tasks(self) -> int:
        return self.cluster.least_nodes * self.cluster.ranks_per_node

    def _setup(self) -> list[str]:
        cluster = self.cluster
        variables = {
            **cluster.environment,
            "PYTHONSAFEPATH": "1",  # otherwise Python imports from the folder of submission before the copy of the code
            RUN: str(self.run),
            SUBMISSION: str(self.submission),
            GRACE: str(cluster.grace_seconds),
            PARTS: str(max(1, self.array)),
            TASKS_PER_NODE: str(cluster.ranks_per_node),
        }
        exports = [f"export {name}={_word(str(value))}" for name, value in variables.items()]
        code = shlex.quote(str(self.submission / "code"))
        return [*cluster.setup, *exports, f"export PYTHONPATH={code}${{PYTHONPATH:+:$PYTHONPATH}}"]

    def _options(self, after: Sequence[str]) -> dict[str, Any]:
        options = {option_name(key): value for key, value in self.cluster.options.items()}
        options |= {"requeue": True, "output": self._output(self.log.name), "chdir": str(Path.cwd())}
        if self.elastic:
            # with --ntasks-per-node, SLURM 22.05 makes a requeued job wait for as many nodes as it had before
            options["mincpus"] = self.cluster.ranks_per_node * (self.cluster.cpus_per_task or 1)
        if self.array:
            options["array"] = f"0-{self.array - 1}"
        if after:
            options |= {"dependency": f"afterok:{':'.join(after)}", "kill-on-invalid-dep": "yes"}
        return {key: value for key, value in options.items() if value is not None and value is not False}

    @property
    def _command(self) -> str:
        return "\n".join(line for stage in self.stages for line in self._lines(stage)) + "\nexit 0"

    def _lines(self, stage: str) -> Iterator[str]:
        python, ranks_python = self.cluster.batch_python, self.cluster.ranks_python
        yield f"\n# {stage}"
        yield f"settings=$({python} -m launch.slurm.begin_end begin {stage}) || exit $?"
        yield 'eval "$settings"'
        yield f"{shlex.join(['srun', *self._srun(stage)])} {ranks_python} -u -m launch.slurm.job_task {stage}"
        yield f"{python} -m launch.slurm.begin_end end {stage} $? || exit $?"

    def _output(self, name: str, stage: str = "") -> str:
        """Return where SLURM writes: the path of a log, with a % of the folder's own name doubled."""
        folder = self.run / stage / "logs" if stage else self.log.parent
        return f"{str(folder).replace('%', '%%')}/{name}"

    def _srun(self, stage: str) -> list[str]:
        log = self._output(self.log.name.replace(".out", "_%t.out"), stage)
        options: dict[str, Any] = {"unbuffered": True, "kill-on-bad-exit": 1, "wait": 0, "open-mode": "append"}
        # srun does not inherit --cpus-per-task from sbatch
        options |= {"output": log, "cpus-per-task": self.cluster.cpus_per_task}
        if not STAGES[stage].trained:
            options |= {"nodes": 1, "ntasks": 1}
        elif self.elastic:
            options["ntasks-per-node"] = self.cluster.ranks_per_node
        return flags(options | self.cluster.srun)


def flags(options: Mapping[str, Any]) -> list[str]:
    """Return options as words of a command line; options that are None or false are left out."""
    named = {option_name(key): value for key, value in options.items()}
    given = {key: value for key, value in named.items() if value is not None and value is not False}
    return [f"--{key}" if value is True else f"--{key}={value}" for key, value in given.items()]


def require_writable(name: str, run: Path) -> None:
    """Raise ValueError if the run's name, its directory or the current folder can't stand in a batch script.

    sbatch reads its options line by line, SLURM drops a backslash from the path of a log, and a colon separates the
    folders of PYTHONPATH: none of these can be quoted.
    """
    for what, text in (("name", name), ("run_dir", str(run)), ("the current folder", str(Path.cwd()))):
        if not is_one_line(text):
            raise ValueError(f"{what}={printable(text)} must be one line without control characters: rename it")
    if refused := re.search(r"[\\:]", str(run)):
        raise ValueError(f"run_dir={run} holds {refused[0]}, which no SLURM job can be given: set another run_dir")


def _word(text: str) -> str:
    """Quote text as one word of bash on one line, so that no line of it is read as an option of sbatch."""
    if is_one_line(text):
        return shlex.quote(text)
    escaped = re.sub(r"[\\']", r"\\\g<0>", text)
    return "$'" + re.sub(r"[\x00-\x1f\x7f]", lambda match: f"\\{ord(match[0]):03o}", escaped) + "'"
