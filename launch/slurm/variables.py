"""Environment variables that a job's batch script sets for its tasks."""

from __future__ import annotations

RUN = "SPRESSO_RUN"
"""The run directory, absolute."""
SUBMISSION = "SPRESSO_SUBMISSION"
"""The folder with the code and the config that the job uses."""
GRACE = "SPRESSO_GRACE"
"""Seconds before the time limit at which SLURM sends its warning signal."""
SUPERVISORS = "SPRESSO_SUPERVISORS"
"""The port at which the first rank's supervisor listens to the others."""
PARTS = "SPRESSO_PARTS"
"""The number of parts that a stage is cut into, each a job of an array."""
TASKS_PER_NODE = "SPRESSO_TASKS_PER_NODE"
"""The number of ranks on each node."""
