"""What the end of a job's attempt has to tell `log.notify`: that it is done, has failed, or makes no progress."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.notify import DONE, FAILED, NO_PROGRESS, News, notify
from launch.slurm import requeue_policy
from launch.slurm.attempt import Attempt
from launch.slurm.requeue_policy import Verdict
from launch.slurm.submitted_jobs import undamaged
from launch.slurm.variables import SUBMISSION
from models.yaml_document import read_yaml
from trainer.stages import STAGES


def tell_of_end(attempt: Attempt, verdict: Verdict, past: Sequence[Mapping[str, Any]], place: int | None) -> None:
    """Tell the user's command or webhook, if the recipe names one and there is something to tell. Never raises.

    Args:
        attempt: the attempt that has ended.
        verdict: what becomes of its job.
        past: history of the earlier starts, oldest first.
        place: how far the stage is, see `begin_end.place`; None if unknown.
    """
    if SUBMISSION not in os.environ:  # a script of an older version
        return
    try:
        event = _event(attempt, verdict, past, place)
        settings: Any = read_yaml(Path(os.environ[SUBMISSION]) / "config.yaml", mend="") if event else {}
        target = settings.get("log", {}).get("notify")
    except Exception as error:  # whatever it is, the job goes on
        print(f"spresso: log.notify is not called: {type(error).__name__}", file=sys.stderr, flush=True)
        return
    run, stage = attempt.stage_folder.parent, attempt.stage_folder.name
    samples = place if STAGES[stage].trained else None
    notify(target, News(event, str(run), settings.get("name", ""), stage, verdict.why, samples, attempt.job))


def _event(attempt: Attempt, verdict: Verdict, past: Sequence[Mapping[str, Any]], place: int | None) -> str:
    """Return the event to tell; empty if there is none."""
    if verdict.then == requeue_policy.OVER:
        return "" if verdict.failure == "superseded" else FAILED
    if verdict.then == requeue_policy.DONE:
        return DONE if _is_last(attempt) else ""
    last = past[-1] if past else {}
    back = (requeue_policy.REQUEUE, requeue_policy.RESTART)
    stuck = last.get("then") in back and place is not None and last.get("place") == place
    return NO_PROGRESS if stuck else ""


def _is_last(attempt: Attempt) -> bool:
    """Whether no later stage was submitted together with this one: the end of each stage is no news."""
    submission, order = os.environ.get(SUBMISSION, ""), list(STAGES)
    ours = [stage for stage, job in undamaged(attempt.stage_folder.parent).items() if job.submission == submission]
    return order.index(attempt.stage_folder.name) >= max((order.index(stage) for stage in ours), default=0)
