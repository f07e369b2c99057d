"""The points of a sweep as one SLURM array. Each element runs the stages of one point, and is requeued alone."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.slurm.job_script import Job
from launch.slurm.variables import RUN, SUBMISSION
from trainer.recipes.cluster import ClusterConfig
from trainer.stages import STAGES

_LOGS = "@LOGS@"  # stands in a line of the script for the folder of the element's logs, which bash puts there


@dataclass(frozen=True)
class Element:
    """One point, as an element of the array."""

    run: Path
    """Its run directory, absolute."""
    submission: Path
    """Folder with its config."""
    stages: list[str]
    """The stages to run, in order."""


class PointsJob(Job):
    """An array, whose element K runs the point K."""

    def __init__(
        self,
        cluster: ClusterConfig,
        elements: Sequence[Element],
        *,
        name: str,
        sweep: Path,
        submission: Path,
        after: Sequence[str] = (),
        at_once: int | None = None,
    ) -> None:
        """Describe the array; SLURM is not contacted yet.

        Args:
            cluster: resources that each element requests.
            elements: the points.
            name: name of the sweep.
            sweep: absolute path of the sweep's directory.
            submission: folder with the code.
            after: ids of the jobs of shared stages. Elements start once these are over, however they ended: a point
                whose stage failed says so itself, and the others run.
            at_once: number of elements that may run at the same time; None: any.

        Raises:
            ValueError: the name or a path can't stand in a batch script.
        """
        self.elements, self.at_once = list(elements), at_once
        stages = [stage for stage in STAGES if any(stage in element.stages for element in elements)]
        cluster = dataclasses.replace(cluster, array=1, stages={})
        super().__init__(cluster, stages, name=name, run=sweep, submission=submission, after=after)

    @property
    def log(self) -> Path:
        """Path of the output of the elements' scripts, with the placeholders of sbatch."""
        return self.run / "logs" / "job_%A_%a.out"

    def make_folders(self) -> None:
        """Create the folders of the logs."""
        own = (element.run / stage / "logs" for element in self.elements for stage in element.stages)
        for folder in (self.log.parent, *own):
            folder.mkdir(parents=True, exist_ok=True)

    def _options(self, after: Sequence[str]) -> dict[str, Any]:
        bound = f"%{self.at_once}" if self.at_once else ""
        ours = {"array": f"0-{len(self.elements) - 1}{bound}"}
        return super()._options([]) | ours | ({"dependency": f"afterany:{':'.join(after)}"} if after else {})

    @property
    def _command(self) -> str:
        return "\n".join([*self._choice(), *self._functions(), 'for stage in $stages; do "run_$stage"; done', "exit 0"])

    def _choice(self) -> Iterator[str]:
        """Yield the lines that choose the point of this element."""
        yield 'case "$SLURM_ARRAY_TASK_ID" in'
        for number, element in enumerate(self.elements):
            run, submission = shlex.quote(str(element.run)), shlex.quote(str(element.submission))
            logs = shlex.quote(str(element.run).replace("%", "%%"))
            yield f"{number})"
            yield f"  export {RUN}={run} {SUBMISSION}={submission}"
            yield f"  logs={logs} stages={shlex.quote(' '.join(element.stages))} ;;"
        yield "esac"

    def _functions(self) -> Iterator[str]:
        """Yield a function for each stage that a point runs."""
        for stage in self.stages:
            lines = "\n".join(self._lines(stage)).strip()
            yield f"\nrun_{stage}() {{\n{lines}\n}}"

    def _lines(self, stage: str) -> Iterator[str]:
        for line in super()._lines(stage):
            yield line.replace(f"--output={_LOGS}/", '--output="$logs"/')

    def _output(self, name: str, stage: str = "") -> str:
        return f"{_LOGS}/{stage}/logs/{name}" if stage else super()._output(name)
