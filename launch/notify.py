"""Tells a user's command or webhook (`log.notify`) that a run is done, has failed, or is requeued without progress.

What fails here, or takes too long, costs a warning and no run. What is told never becomes part of a command line or of
a shell's text: a command finds it in its environment and, as JSON, on its standard input; a webhook gets the JSON.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from launch.signals import INTERRUPTED
from models.documents import to_json
from trainer.file_names import printable, printable_lines
from trainer.recipes.schema import Config

SECONDS = 10.0
"""How long a notification may take."""
DONE, FAILED, NO_PROGRESS = "done", "failed", "no_progress"
_VARIABLE = re.compile(r"\$\w+")
_URLS = ("http://", "https://")


class News(NamedTuple):
    """What is told."""

    event: str
    """`done`, `failed` or `no_progress`."""
    run: str
    """The run directory."""
    name: str = ""
    stage: str = ""
    """The stage, if it is one stage's news."""
    why: str = ""
    samples: int | None = None
    """Samples of the newest checkpoint, if that is known."""
    job: str = ""
    """Number of the SLURM job, if it is one's news."""

    @property
    def document(self) -> dict[str, Any]:
        """The JSON object that is told. Chat services show its `text`."""
        where = f"{self.name or self.run}{self.stage and f', {self.stage}'}"
        what = {DONE: "is done", FAILED: "has failed", NO_PROGRESS: "is requeued without progress"}[self.event]
        text = f"{where}: {what}{self.why and f': {self.why}'}"
        return {"text": text, **self._asdict(), "host": socket.gethostname(), "time": round(time.time(), 1)}


def telling(config: Config, work: Callable[[], str], *, stage: str = "") -> str:
    """Do the work of a command, tell how it ended, and return what the work returned. Rank 0 tells, if there are ranks.

    A run that was asked to stop is not told of: the same command resumes it.
    """
    try:
        outcome = work()
    except (Exception, SystemExit) as error:
        if not (isinstance(error, SystemExit) and error.code == INTERRUPTED):
            _tell_of(config, stage, FAILED, _reason(error))
        raise
    if outcome == "done":
        _tell_of(config, stage, DONE, "")
    return outcome


def _tell_of(config: Config, stage: str, event: str, why: str) -> None:
    if os.environ.get("RANK") in (None, "0"):
        notify(config.log.notify, News(event, config.run_dir, config.name, stage, why))


def _reason(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return f"a rank ended with status {error.code}"
    return printable_lines(str(error) or type(error).__name__)


def notify(target: str | None, news: News) -> None:
    """Tell a command or a webhook, for a bounded time; warn if that fails.

    Args:
        target: the value of `log.notify`; None: nobody is told.
        news: what to tell.
    """
    if target is None:
        return
    thread = threading.Thread(target=_tell_or_warn, args=(target, news), daemon=True)
    thread.start()
    thread.join(SECONDS + 1)
    if thread.is_alive():  # such as a name server that does not answer
        _warn("log.notify takes too long")


def _tell_or_warn(target: str, news: News) -> None:
    try:
        target = _value(target)
        if target.startswith(_URLS):
            _post(os.path.expandvars(target), news)
        else:
            # A word is replaced as a whole or not at all: `sh -c '… "$NAME"'` gets its text as it was written.
            _call([_value(word) for word in shlex.split(target)], news)
    except Exception as error:  # its text may hold the target
        _warn(f"log.notify failed: {type(error).__name__}")


def _value(word: str) -> str:
    """Return the value of the environment variable that a word names; another word stays."""
    return os.path.expandvars(word) if _VARIABLE.fullmatch(word) else word


def _post(url: str, news: News) -> None:
    headers = {"Content-Type": "application/json", "User-Agent": "spresso"}
    request = urllib.request.Request(url, data=to_json(news.document).encode(), headers=headers, method="POST")
    host = urlsplit(url).hostname or ""
    try:
        with urllib.request.urlopen(request, timeout=SECONDS):
            pass
    except urllib.error.HTTPError as error:
        _warn(f"the webhook of log.notify at {printable(host)} answers with status {error.code}")
    except OSError as error:
        reason = getattr(error, "reason", error)
        _warn(f"the webhook of log.notify at {printable(host)} can't be reached: {printable(str(reason))}")


def _call(words: list[str], news: News) -> None:
    """Run a command; end it and its children if it takes too long."""
    told = {f"SPRESSO_{key.upper()}": str(value) for key, value in news.document.items() if value is not None}
    environment = {**os.environ, **{key: value.replace("\0", "") for key, value in told.items()}}
    process = subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=sys.__stderr__, env=environment, start_new_session=True
    )
    try:
        process.communicate(to_json(news.document).encode(), timeout=SECONDS)
        if process.returncode:
            _warn(f"the command of log.notify ended with status {process.returncode}")
    except subprocess.TimeoutExpired:
        _warn(f"the command of log.notify takes more than {SECONDS:g} s, and is ended")
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _warn(text: str) -> None:
    print(f"spresso: {text}", file=sys.stderr, flush=True)
