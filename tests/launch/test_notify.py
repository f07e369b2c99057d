"""Notifications: what a command and a webhook get, and that whatever fails with them costs a warning alone."""

from __future__ import annotations

import json
import os
import select
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch import notify as module
from launch.cli import main
from launch.notify import DONE, FAILED, News, notify, telling
from launch.signals import INTERRUPTED

NEWS = News(FAILED, "/runs/mine", "mine", "pretrain", "the loss is `$(touch hacked)`; \"quoted\"\n'twice'", 64, "12")
KEEP = """
import json, os, sys
told = {key: value for key, value in os.environ.items() if key.startswith("SPRESSO_")}
json.dump([sys.argv[2:], told, json.load(sys.stdin)], open(sys.argv[1], "w"))
"""


@pytest.fixture
def program(tmp_path) -> Path:
    """A program that keeps its arguments, its environment and its standard input in a file."""
    path = tmp_path / "keep me.py"
    path.write_text(KEEP)
    return path


def test_a_command_gets_the_news_as_data(program, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CHANNEL", "two words; $(touch hacked)")
    out = tmp_path / "told.json"
    notify(f"{sys.executable} '{program}' {out} --to $CHANNEL '*'", NEWS)
    words, environment, document = json.loads(out.read_text())
    assert words == ["--to", "two words; $(touch hacked)", "*"]
    assert document["event"] == environment["SPRESSO_EVENT"] == "failed"
    assert document["why"] == environment["SPRESSO_WHY"] == NEWS.why
    assert (document["samples"], environment["SPRESSO_SAMPLES"]) == (64, "64")
    assert document["text"] == f"mine, pretrain: has failed: {NEWS.why}"
    assert {"run", "name", "stage", "job", "host", "time"} <= document.keys()
    assert capsys.readouterr().err == ""


def test_a_command_may_be_a_variable_and_a_shell(tmp_path, monkeypatch):
    out = tmp_path / "told"
    monkeypatch.setenv("NOTIFY", f"sh -c 'printf %s \"$SPRESSO_RUN $SPRESSO_WHY\" > {out}'")
    monkeypatch.setenv("SPRESSO_RUN", '"; touch hacked; "')  # as a batch script sets it
    notify("$NOTIFY", NEWS)
    assert out.read_text() == f"/runs/mine {NEWS.why}"


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("/no/such/program --key hunter2", "log.notify failed: FileNotFoundError"),
        ("false hunter2", "the command of log.notify ended with status 1"),
        ("$NO_SUCH_VARIABLE", "log.notify failed: FileNotFoundError"),
        ("'hunter2", "log.notify failed: ValueError"),
        ("http://127.0.0.1:9/hunter2", "the webhook of log.notify at 127.0.0.1 can't be reached"),
        ("https://[hunter2", "log.notify failed: ValueError"),
        ("http://host with spaces/hunter2", "log.notify failed: InvalidURL"),
    ],
)
def test_what_fails_is_a_warning_without_the_target(target, says, monkeypatch, capsys):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    notify(target, NEWS)
    said = capsys.readouterr().err
    assert said.startswith(f"spresso: {says}")
    assert "hunter2" not in said


def test_a_command_that_hangs_is_ended_with_its_children(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "SECONDS", 1.0)
    pid = tmp_path / "pid"
    notify(f"sh -c 'sleep 1000 & echo $! > {pid}; cat >/dev/null; wait'", NEWS)
    assert "takes more than 1 s, and is ended" in capsys.readouterr().err
    with suppress(ProcessLookupError):
        child = os.pidfd_open(int(pid.read_text()))
        assert select.select([child], [], [], 30)[0]  # readable once the process has ended


def test_a_notification_that_can_not_be_bounded_is_left_behind(monkeypatch, capsys):
    release = threading.Event()
    monkeypatch.setattr(module, "SECONDS", -1.0)
    monkeypatch.setattr(module, "_call", lambda words, news: release.wait())
    notify("program", NEWS)
    release.set()
    assert capsys.readouterr().err == "spresso: log.notify takes too long\n"


@pytest.fixture
def webhook() -> Iterator[SimpleNamespace]:
    """A server that keeps what it is posted and answers with the status that its path names."""
    got = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            got.append((self.path, self.headers["Content-Type"], json.loads(body)))
            self.send_response(int(self.path.rpartition("/")[2]))
            self.end_headers()

        def log_message(self, *words: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield SimpleNamespace(url=f"http://127.0.0.1:{server.server_port}", got=got)
        server.shutdown()


def test_a_webhook_gets_json(webhook, monkeypatch, capsys):
    monkeypatch.setenv("TOKEN", "s3cret")
    notify(f"{webhook.url}/$TOKEN/200", NEWS)
    ((path, kind, document),) = webhook.got
    assert (path, kind) == ("/s3cret/200", "application/json")
    assert document["text"].startswith("mine, pretrain: has failed")
    assert capsys.readouterr().err == ""


def test_a_webhook_that_refuses_is_a_warning(webhook, capsys):
    notify(f"{webhook.url}/hunter2/503", NEWS)
    assert capsys.readouterr().err == "spresso: the webhook of log.notify at 127.0.0.1 answers with status 503\n"


def recipe(target: str | None) -> SimpleNamespace:
    return SimpleNamespace(name="mine", run_dir="/runs/mine", log=SimpleNamespace(notify=target))


def raises(error: BaseException):
    def work() -> str:
        raise error

    return work


@pytest.fixture
def told(monkeypatch) -> list[News]:
    news: list[News] = []
    monkeypatch.setattr(module, "notify", lambda target, item: news.append(item))
    monkeypatch.delenv("RANK", raising=False)
    return news


def test_a_run_s_end_and_its_failure_are_told(told):
    assert telling(recipe("x"), lambda: "done", stage="pretrain") == "done"
    with pytest.raises(ValueError, match="no data"):
        telling(recipe("x"), raises(ValueError("no data\x07")))
    with pytest.raises(SystemExit):
        telling(recipe("x"), raises(SystemExit(1)))
    with pytest.raises(RuntimeError):
        telling(recipe("x"), raises(RuntimeError()))
    assert [(news.event, news.stage, news.why) for news in told] == [
        (DONE, "pretrain", ""),
        (FAILED, "", "no data\\x07"),
        (FAILED, "", "a rank ended with status 1"),
        (FAILED, "", "RuntimeError"),
    ]


def test_what_is_no_news_is_not_told(told, monkeypatch):
    assert telling(recipe("x"), lambda: "stopped") == "stopped"
    with pytest.raises(KeyboardInterrupt):
        telling(recipe("x"), raises(KeyboardInterrupt()))
    with pytest.raises(SystemExit):
        telling(recipe("x"), raises(SystemExit(INTERRUPTED)))
    monkeypatch.setenv("RANK", "1")
    assert telling(recipe("x"), lambda: "done") == "done"
    assert told == []


def test_the_command_train_tells(tiny, program, tmp_path, monkeypatch, capsys):
    from trainer.recipes.values import to_yaml

    config = tiny("pretrain.samples=16", "log.every=8", "log.samples_every=0", "log.trackers=[]")
    (tmp_path / "recipe.yaml").write_text(to_yaml(config))
    out = tmp_path / "told.json"
    command = f"log.notify={sys.executable} '{program}' {out}"
    assert main(["train", str(tmp_path / "recipe.yaml"), "stage=pretrain", command]) == 0
    assert json.loads(out.read_text())[2]["event"] == DONE
    out.unlink()
    assert main(["train", str(tmp_path / "recipe.yaml"), "stage=pretrain", "seed=7", command]) == 2
    _, _, document = json.loads(out.read_text())
    assert (document["event"], document["stage"], document["run"]) == (FAILED, "pretrain", str(tmp_path / "run"))
    assert "holds a run with other settings: seed (0 → 7)" in document["why"]
    assert os.environ.get("SPRESSO_EVENT") is None
