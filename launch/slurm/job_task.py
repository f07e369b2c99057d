"""What each task of a SLURM job runs: `python -m launch.slurm.job_task STAGE`.

A task of a trained stage becomes the supervisor of its rank (`launch.slurm.supervisor`), which restarts the rank within
the job. Any other task does its work (`launch.slurm.worker`) itself.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from launch.slurm.quiet_imports import quiet_imports
from launch.slurm.variables import RUN
from trainer.stages import is_trained


def main() -> None:
    """Run one task, which its environment describes; does not return."""
    stage = sys.argv[1]
    if not is_trained(stage):
        from launch.output import survive_readers
        from launch.slurm.attempt import Attempt
        from launch.slurm.slurm_task import SlurmTask
        from launch.slurm.worker import load_config, work
    else:
        with quiet_imports():  # all of these import numpy
            from launch.output import survive_readers
            from launch.slurm.attempt import Attempt
            from launch.slurm.slurm_task import SlurmTask
            from launch.slurm.supervisor import supervise
            from launch.slurm.worker import load_config, work
    survive_readers()
    attempt, task = Attempt.here(Path(os.environ[RUN]) / stage), SlurmTask.here()
    os.environ.setdefault("OMP_NUM_THREADS", str(task.threads))
    if is_trained(stage):
        try:
            config = load_config()
        except (ValueError, OSError):
            pass  # the worker fails likewise, and leaves a note
        else:
            if config.cluster.of(stage).restarts_in_job:
                supervise(stage, attempt, task, config)
    work(stage, attempt, task)


if __name__ == "__main__":
    main()
