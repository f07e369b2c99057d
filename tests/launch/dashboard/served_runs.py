"""Runs in a folder, and a dashboard that serves them, for the tests of the dashboard."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import soundfile

from launch.dashboard.server import Dashboard

RATE = 16_000


def train_line(samples: int, loss: float, **values: object) -> str:
    terms = {"denoising": loss, "other": loss / 2}
    line = {"kind": "train", "samples": samples, "time": time.time(), "loss": loss, "loss_terms": terms, "lr": 1e-4}
    return json.dumps(line | values) + "\n"


def add_run(folder: Path, *, stage: str = "autoencode", lines: int = 20, state: str = "running") -> Path:
    """Write a stage of a run, as a training leaves it; return the stage's folder."""
    made = folder / stage
    (made / "logs").mkdir(parents=True)
    status = {"stage": stage, "state": state, "samples": 8 * lines, "of": 8000, "loss": 0.5}
    (made / "status.json").write_text(json.dumps(status))
    held_out = {
        "kind": "held_out",
        "samples": 80,
        "time": time.time(),
        "loss": 0.7,
        "z_rank": 5,
        "z_error": {"8_bits": 1},
    }
    text = "".join(train_line(8 * n, 1 / n) for n in range(1, lines + 1)) + json.dumps(held_out) + "\n"
    (made / "metrics.jsonl").write_text(text)
    (made / "logs" / "rank_0.log").write_text("the first line\nthe last line\n")
    return made


def add_sound(stage: Path, name: str = "clip_1.decoded.flac", samples: int = 80) -> Path:
    path = stage / "samples" / f"step_{samples:012}" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.2 * np.sin(np.arange(2 * RATE) * 0.2), RATE)
    return path


@contextmanager
def served(folder: Path) -> Iterator[Dashboard]:
    """A dashboard on a free port, for the length of a `with`."""
    with Dashboard(folder, port=0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


class Answer:
    """An answer of the server."""

    def __init__(self, answer: http.client.HTTPResponse) -> None:
        self.status, self.body = answer.status, answer.read()
        self.headers = {name.lower(): value for name, value in answer.getheaders()}

    @property
    def json(self) -> dict:
        return json.loads(self.body)


def ask(
    server: Dashboard, path: str, *, method: str = "GET", key: bool = True, host: str = "", **headers: str
) -> Answer:
    """Send a request as it stands, with the key as a cookie."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    connection.putheader("Host", host or f"127.0.0.1:{server.server_port}")
    if key:
        connection.putheader("Cookie", f"{server.cookie}={server.key}")
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders()
    try:
        return Answer(connection.getresponse())
    finally:
        connection.close()
