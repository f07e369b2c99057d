"""The cluster section of a recipe: its schema, its checks, and the resources that each stage requests from SLURM."""

from __future__ import annotations

import dataclasses
import difflib
import re
import shlex
import sys
from dataclasses import dataclass, field
from typing import Any

from models.ranges import range_of, range_problems, ranged
from trainer.file_names import printable
from trainer.stages import STAGES

_NODES = re.compile(r"(\d+)(?:-(\d+))?", re.ASCII)
_TIME = re.compile(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}|UNLIMITED|INFINITE", re.IGNORECASE | re.ASCII)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OPTION = re.compile(r"[A-Za-z][A-Za-z0-9-]*")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_ONE_LINE = ("mem", "partition", "account", "qos", "constraint", "python", "container")
OURS = (
    # options of sbatch that requeueing depends on, or that have a setting of their own
    *("array", "chdir", "dependency", "error", "job-name", "kill-on-invalid-dep", "open-mode", "output", "requeue"),
    *("no-requeue", "signal", "wrap", "nodes", "gpus-per-node", "ntasks-per-node", "ntasks", "cpus-per-task", "mem"),
    *("time", "partition", "account", "qos", "constraint"),
)
_WHOLE = ("gpus",)  # an option of sbatch that begins like one of `OURS`


@dataclass
class ClusterConfig:
    """Where the stages run. `cluster=NAME` reads `configs/cluster/NAME.yaml`, or the YAML file at that path."""

    kind: str = "local"
    """`local`: stages run on this machine; `slurm`: each stage is a job that waits for the previous one."""
    nodes: str = "1"
    """Nodes of each job: `4`, or a range such as `2-8`, from which each start of the job takes what is available."""
    gpus_per_node: int = ranged(0, least=0)
    """GPUs per node; 0: the ranks compute on CPUs."""
    tasks_per_node: int | None = ranged(None, least=1)
    """Ranks per node; None: one per GPU, or one without GPUs."""
    cpus_per_task: int | None = ranged(None, least=1)
    """CPU cores per rank; None: the cluster's default."""
    mem: str | None = None
    """Host memory per node, such as `200G`; None: the cluster's default."""
    time: str | None = None
    """Time limit of a job in sbatch's notation (`24:00:00`, `2-0` for two days, or minutes). A job that reaches it
    saves and is requeued until its stage is done. None: the partition's limit."""
    partition: str | None = None
    """SLURM partition; None: the cluster's default."""
    account: str | None = None
    """SLURM account that is charged; None: the cluster's default."""
    qos: str | None = None
    """SLURM quality of service; None: the cluster's default."""
    constraint: str | None = None
    """Features that the nodes must have, such as `h100`; None: any nodes."""
    options: dict[str, Any] = field(default_factory=dict)
    """Other options of sbatch by their long names: `{exclusive: true, gres: "gpu:a100:8", exclude: "node[7-9]"}`."""
    srun: dict[str, Any] = field(default_factory=dict)
    """Options of srun by their long names: `{container-image: /images/train.sqsh, cpu-bind: cores}`."""
    setup: list[str] = field(default_factory=list)
    """Lines of bash that run first in the job, such as `module load cuda/13.0`."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables of the job."""
    python: str | None = None
    """Command that starts Python in the job; None: the Python that submits the job."""
    container: str | None = None
    """Command that starts a program in a container, such as `apptainer exec --nv spresso.sif`. The ranks run the
    container's `python3`; the batch script, which asks SLURM to requeue the job, stays outside. None: no container."""
    grace_seconds: int = ranged(120, least=1)
    """Seconds before the time limit at which a job is signalled to save and leave; enough for one step and one save.
    SLURM may send the signal up to a minute early."""
    restarts_in_job: int = ranged(10, least=0)
    """Most restarts of all ranks on the same nodes, within one start of a job, after a rank was killed or has failed.
    After so many, or if a node is lost or the same failure recurs, the job is requeued or ends. 0: the ranks never
    restart in the job."""
    check_nodes: bool = True
    """Whether each start of a training job first checks its nodes, which takes seconds: GPUs (present, memory free,
    errors that `nvidia-smi` reports), a matrix product, an all-reduce over all nodes, their links, clocks and disks."""
    leave_out: int = ranged(1, least=0)
    """Most nodes that a job may exclude, over all its starts, because they failed the check: it is requeued without
    them. If more nodes fail, the log names them, and the job trains on them all the same. 0: none is excluded."""
    array: int = ranged(1, least=1)
    """Jobs among which the sound files of `prepare` are divided. To divide the clips of `evaluate`, set
    `stages.evaluate.array`."""
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    """A stage's own values for the settings above: `{prepare: {array: 16}, evaluate: {time: "1:00:00"}}`. By default
    `synth`, `prepare` and `page` request one task without a GPU, `evaluate` one task with a GPU, and `quantize` one
    node."""

    @property
    def least_nodes(self) -> int:
        """Smallest number of nodes of a job."""
        return int(self.nodes.partition("-")[0])

    @property
    def most_nodes(self) -> int:
        """Largest number of nodes of a job."""
        return int(self.nodes.rpartition("-")[2])

    @property
    def ranks_per_node(self) -> int:
        """Ranks per node: `tasks_per_node`, or one per GPU, or one."""
        return self.tasks_per_node or max(1, self.gpus_per_node)

    @property
    def ranks_python(self) -> str:
        """Command that starts the ranks' Python: the container's, or `batch_python`."""
        return f"{self.container} python3" if self.container else self.batch_python

    @property
    def batch_python(self) -> str:
        """Command that starts Python in the batch script: `python`, or the Python that runs now."""
        return self.python or shlex.quote(sys.executable)

    def of(self, stage: str) -> ClusterConfig:
        """Return the settings for the job of one stage."""
        row = STAGES[stage]
        chosen: dict[str, Any] = {**row.resources}
        if "gpus_per_node" in chosen:
            chosen["gpus_per_node"] = min(chosen["gpus_per_node"], self.gpus_per_node)
        for key, value in self.stages.get(stage, {}).items():
            ours = getattr(self, key)
            chosen[key] = {**ours, **value} if isinstance(ours, dict) else value
        if "nodes" in chosen:
            chosen["nodes"] = str(chosen["nodes"])
        if not row.array_by_default:
            chosen["array"] = chosen.get("array", 1) if row.array else 1
        return dataclasses.replace(self, **chosen, stages={})

    def problems(self) -> list[str]:
        """Return every problem as a line; empty if there is none."""
        if self.kind not in ("local", "slurm"):
            return [
                f"cluster.kind={self.kind} is neither local nor slurm: cluster=slurm reads configs/cluster/slurm.yaml"
            ]
        found = _problems_of(self, "cluster")
        for stage, values in self.stages.items():
            if stage not in STAGES:
                found.append(
                    f"cluster.stages.{stage}: there is no such stage; the nearest one is {_nearest(stage, STAGES)}"
                )
                continue
            unknown = [key for key in values if key not in _OF_STAGES]
            found += [
                f"unknown key cluster.stages.{stage}.{key}: the nearest known one is {_nearest(key, _OF_STAGES)}"
                for key in unknown
            ]
            misfits = [key for key in values.keys() - unknown if not _fits(key, values[key])]
            found += [
                f"cluster.stages.{stage}.{key}={values[key]!r} must be of type {_OF_STAGES[key]}" for key in misfits
            ]
            if not unknown and not misfits:
                found += _problems_of(self.of(stage), f"cluster.stages.{stage}")
        return list(dict.fromkeys(found))


_OF_STAGES = {
    item.name: str(item.type) for item in dataclasses.fields(ClusterConfig) if item.name not in ("kind", "stages")
}


def _fits(key: str, value: Any) -> bool:
    kind = _OF_STAGES[key]
    if value is None:
        return "None" in kind
    if kind.startswith("dict"):
        return isinstance(value, dict)
    if kind.startswith("list"):
        return isinstance(value, list)
    if kind.startswith("int"):
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, str | int)


def _problems_of(cluster: ClusterConfig, where: str) -> list[str]:
    found = []
    match = _NODES.fullmatch(str(cluster.nodes))
    if not match or not 1 <= int(match[1]) <= int(match[2] or match[1]):
        found.append(f"{where}.nodes={cluster.nodes} is neither a number like 4 nor a range like 2-8")
    if cluster.time is not None and not _TIME.fullmatch(str(cluster.time)):
        found.append(f"{where}.time={cluster.time} is not a time limit: write 24:00:00, 2-12 (days-hours) or minutes")
    for item in dataclasses.fields(cluster):
        if (allowed := range_of(item)) is not None:
            found += range_problems(f"{where}.{item.name}", getattr(cluster, item.name), allowed)
    for key in _ONE_LINE:
        if not _is_option_value(value := getattr(cluster, key)):
            found.append(f"{where}.{key}={printable(str(value))} must be one line without control characters")
    found += [*_option_problems(cluster, where), *_environment_problems(cluster, where)]
    if strange := [line for line in cluster.setup if not isinstance(line, str) or "\0" in line]:
        found.append(f"{where}.setup holds {printable(str(strange[0]))}, which is no line of bash")
    for key in cluster.options:
        if name := _ours_for(option_name(key)):
            setting = name.replace("-", "_").replace("ntasks_per_node", "tasks_per_node")
            mend = f"set {where}.{setting} instead" if setting in _OF_STAGES else "remove it: requeueing depends on it"
            found.append(f"{where}.options.{key}: {mend}")
    return found


def _ours_for(name: str) -> str:
    """Return the option of `OURS` that sbatch takes a name for, the whole one or its beginning; empty if it is none."""
    if name in OURS or name in _WHOLE:
        return name if name in OURS else ""
    return next((ours for ours in OURS if name and ours.startswith(name)), "")


def option_name(key: str) -> str:
    """Return the long name of an option of sbatch or srun that a recipe names: `--mail_type` → `mail-type`."""
    return key.replace("_", "-").lstrip("-")


def is_one_line(text: str) -> bool:
    """Whether text stays on one line of a batch script: it holds no line break or other control character."""
    return _CONTROL.search(text) is None


def _option_problems(cluster: ClusterConfig, where: str) -> list[str]:
    """Return the options that could not stand on one line of the job's script as what they are."""
    found = []
    for group in ("options", "srun"):
        for key, value in getattr(cluster, group).items():
            named = f"{where}.{group}.{printable(str(key))}"
            if not isinstance(key, str) or not _OPTION.fullmatch(option_name(key)):
                found.append(f"{named} is no option: write its long name of letters, digits and hyphens")
            elif not _is_option_value(value):
                found.append(f"{named}={printable(str(value))} must be one line without control characters")
    return found


def _environment_problems(cluster: ClusterConfig, where: str) -> list[str]:
    """Return the variables whose names bash would not take as names, and those that have no text."""
    found = []
    for key, value in cluster.environment.items():
        named = f"{where}.environment.{printable(str(key))}"
        if not isinstance(key, str) or not _VARIABLE.fullmatch(key):
            found.append(f"{named} is no variable: write a name of letters, digits and _, which no digit begins")
        elif not isinstance(value, str | int | float) or "\0" in str(value):
            found.append(f"{named}={printable(str(value))} is no value of a variable: write text or a number")
    return found


def _is_option_value(value: Any) -> bool:
    return value is None or (isinstance(value, str | int | float) and is_one_line(str(value)))


def _nearest(name: str, known: Any) -> str:
    return difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)[0]
