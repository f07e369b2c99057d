"""What a recipe says of a SLURM cluster: the schema, and what each stage asks for."""

from __future__ import annotations

import dataclasses
import difflib
import re
from dataclasses import dataclass, field
from typing import Any

from trainer.stages import STAGES

_NODES = re.compile(r"(\d+)(?:-(\d+))?")
_TIME = re.compile(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}|UNLIMITED|INFINITE", re.IGNORECASE)
OURS = (
    # options of sbatch that a job's survival stands on, or that other settings say
    *("array", "chdir", "dependency", "error", "job-name", "kill-on-invalid-dep", "open-mode", "output", "requeue"),
    *("no-requeue", "signal", "wrap", "nodes", "gpus-per-node", "ntasks-per-node", "ntasks", "cpus-per-task", "mem"),
    *("time", "partition", "account", "qos", "constraint"),
)


@dataclass
class ClusterConfig:
    """Where the stages run. `cluster=NAME` takes `configs/cluster/NAME.yaml`, or a file of one's own."""

    kind: str = "local"
    """`local`: on this machine; `slurm`: each stage is a job after the one before, through submitit."""
    nodes: str = "1"
    """Of each job: `4`, or `2-8` for what it can get, which may differ each time that it is requeued."""
    gpus_per_node: int = 0
    """0: the ranks compute on CPUs."""
    tasks_per_node: int | None = None
    """Ranks to a node; None: one a GPU, or one."""
    cpus_per_task: int | None = None
    """Cores to a rank; None: what the cluster gives."""
    mem: str | None = None
    """Host memory of a node, such as `200G`; None: what the cluster gives."""
    time: str | None = None
    """Time limit of a job, as sbatch takes it (`24:00:00`, `2-0`, minutes). A job that reaches it saves, leaves and is
    requeued, as often as it takes. None: the partition's."""
    partition: str | None = None
    """None: the cluster's default; so for the next three."""
    account: str | None = None
    """Who pays."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that the nodes have to have, such as `h100`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Any other options of sbatch by their long names: `{exclusive: true, gres: "gpu:a100:8", exclude: node[7-9]}`."""
    srun: dict[str, Any] = field(default_factory=dict)
    """Options of srun by their long names: `{container-image: /images/train.sqsh, cpu-bind: cores}`."""
    setup: list[str] = field(default_factory=list)
    """Lines of bash before anything else, such as `module load cuda/13.0`."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables of the job."""
    python: str | None = None
    """Command of the Python in the job; None: the one that submits."""
    grace_seconds: int = 120
    """So long before the time limit a job is told to save and leave. More than a step and a save take; SLURM may say it
    up to a minute early."""
    array: int = 1
    """Jobs that share the sound files of `prepare`; for those that share the clips of `evaluate`, say
    `stages.evaluate.array`."""
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    """A stage's own values for any of the above: `{prepare: {array: 16, partition: cpu}, evaluate: {time: "1:00:00"}}`.
    `synth`, `prepare` and `page` take one task without a GPU where nothing is said here, `evaluate` one with a GPU,
    `quantize` one node."""

    @property
    def least_nodes(self) -> int:
        """Nodes that a job has in any case."""
        return int(self.nodes.partition("-")[0])

    @property
    def most_nodes(self) -> int:
        """Nodes that a job may get."""
        return int(self.nodes.rpartition("-")[2])

    @property
    def ranks_per_node(self) -> int:
        """Tasks to a node."""
        return self.tasks_per_node or max(1, self.gpus_per_node)

    def of(self, stage: str) -> ClusterConfig:
        """What a stage's job asks for."""
        row = STAGES[stage]
        chosen: dict[str, Any] = {**row.asks}
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
        """All that is wrong with it; empty where nothing is."""
        if self.kind not in ("local", "slurm"):
            return [
                f"cluster.kind={self.kind} is neither local nor slurm: cluster=slurm takes configs/cluster/slurm.yaml"
            ]
        found = _problems_of(self, "cluster")
        for stage, values in self.stages.items():
            if stage not in STAGES:
                found.append(
                    f"cluster.stages.{stage}: there is no such stage, the nearest is {_nearest(stage, STAGES)}"
                )
                continue
            unknown = [key for key in values if key not in _OF_STAGES]
            found += [
                f"unknown key cluster.stages.{stage}.{key}: the nearest known one is {_nearest(key, _OF_STAGES)}"
                for key in unknown
            ]
            misfits = [key for key in values.keys() - unknown if not _fits(key, values[key])]
            found += [f"cluster.stages.{stage}.{key}={values[key]!r} is no {_OF_STAGES[key]}" for key in misfits]
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
        found.append(f"{where}.time={cluster.time} is no time limit: write 24:00:00, 2-12 (days-hours) or minutes")
    for key in ("tasks_per_node", "cpus_per_task", "array", "grace_seconds"):
        value = getattr(cluster, key)
        if value is not None and value < 1:
            found.append(f"{where}.{key}={value} is at least 1")
    if cluster.gpus_per_node < 0:
        found.append(f"{where}.gpus_per_node={cluster.gpus_per_node} is at least 0")
    for key in cluster.options:
        name = key.replace("_", "-").lstrip("-")
        if name in OURS:
            setting = name.replace("-", "_").replace("ntasks_per_node", "tasks_per_node")
            mend = (
                f"say {where}.{setting}=…" if setting in _OF_STAGES else "leave it out: jobs that come back stand on it"
            )
            found.append(f"{where}.options.{key}: {mend}")
    return found


def _nearest(name: str, known: Any) -> str:
    return difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)[0]
