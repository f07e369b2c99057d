"""What the dashboard's server refuses, and what it sends."""

from __future__ import annotations

import gzip
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from http.cookiejar import CookieJar
from pathlib import Path
from urllib.parse import quote

import pytest

from launch.cli import main
from launch.dashboard.served_files import part_of
from launch.dashboard.server import Dashboard
from tests.launch.dashboard.served_runs import add_run, add_sound, ask, served

ROOT = Path(__file__).parents[3]
HOSTILE = "<img src=x onerror=alert(1)> &\"' \u202e"
SOUND = "autoencode/samples/step_000000000080/clip_1.decoded.flac"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("dashboard")
    runs = root / "runs"
    stage = add_run(runs / "mine")
    add_sound(stage)
    (runs / "mine" / "config.yaml").write_text("seed: 1\n")
    (runs / "mine" / "secret.txt").write_text("secret")
    (stage / "export").mkdir()
    (stage / "export" / "weights.safetensors").write_text("secret")
    page = runs / "mine" / "page"
    (page / "audio").mkdir(parents=True)
    (page / "index.html").write_text("<!doctype html><title>page</title>")
    (page / "audio" / "001.js").write_text("spressoSound()")
    (page / "other.html").write_text("secret")
    add_run(runs / "sweep" / "1", lines=5)
    add_run(runs / HOSTILE)
    (root / "secret.flac").write_text("secret")
    add_sound(add_run(root / "outside"))
    (runs / "link").symlink_to(root / "outside")
    (stage / "samples" / "step_000000000080" / "leak.decoded.flac").symlink_to(root / "secret.flac")
    (stage / "samples" / "step_000000000096").symlink_to(
        root / "outside" / "autoencode" / "samples" / "step_000000000080"
    )
    (stage / "samples" / "step_000000000080" / "dir.decoded.flac").mkdir()
    os.mkfifo(stage / "samples" / "step_000000000080" / "pipe.decoded.flac")
    return runs


@pytest.fixture(scope="module")
def server(folder) -> Iterator[Dashboard]:
    with served(folder) as running:
        yield running


def test_the_address_is_loopback_alone(server):
    assert server.server_address[0] == "127.0.0.1"
    others = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)} - {"127.0.0.1"}
    for other in [*others, "127.0.0.2"]:
        with socket.socket() as probe:
            assert probe.connect_ex((other, server.server_port)) != 0


@pytest.mark.parametrize("host", ["127.0.0.1:{port}", "localhost:{port}", "LOCALHOST", "127.0.0.1:9999", "[::1]:8017"])
def test_this_machine_by_any_port_is_answered(server, host):
    assert ask(server, "/api/runs", host=host.format(port=server.server_port)).status == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "127.0.0.1.evil.example",
        "evil.example:8017",
        "0.0.0.0",
        "127.0.0.1:8017@evil",
        "localhost.",
        "a b",
    ],
)
def test_other_names_are_refused(server, host):
    refused = ask(server, "/api/runs", host=host)
    assert refused.status == 421
    assert b"runs" not in refused.body


def test_two_or_no_host_are_refused(server):
    for head in (b"", b"Host: localhost\r\nHost: evil.example\r\n"):
        with socket.create_connection(("127.0.0.1", server.server_port)) as raw:
            cookie = f"Cookie: {server.cookie}={server.key}\r\n".encode()
            raw.sendall(b"GET /api/runs HTTP/1.1\r\n" + head + cookie + b"Connection: close\r\n\r\n")
            assert raw.recv(100).startswith(b"HTTP/1.1 421")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "get", "X"])
def test_other_methods_are_refused(server, method):
    answer = ask(server, "/api/runs", method=method)
    assert (answer.status, answer.headers["allow"]) == (405, "GET, HEAD")


def test_a_body_is_refused(server):
    assert ask(server, "/api/runs", Content_Length="5").status == 405
    assert ask(server, "/api/runs", Transfer_Encoding="chunked").status == 405


@pytest.mark.parametrize(
    "path",
    ["/", "/run/mine", "/api/runs", "/api/run/mine", f"/sound/mine/{SOUND}", "/assets/run.js", "/?key=", "/?key=x"],
)
def test_without_the_key_nothing_is_told(server, path):
    for given in ({}, {"Cookie": f"{server.cookie}=wrong"}, {"Cookie": f"spresso-1={server.key}"}, {"Cookie": "\xff"}):
        refused = ask(server, path, key=False, **given)
        assert refused.status == 403
        assert b"address that `spresso dashboard` printed" in refused.body


def test_the_address_sets_the_cookie_and_leaves_the_key_out(server):
    opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(jar := CookieJar()))
    with opener.open(server.url) as page:
        assert page.url == f"http://127.0.0.1:{server.server_port}/"
    (cookie,) = jar
    assert cookie.has_nonstandard_attr("HttpOnly")
    assert cookie.get_nonstandard_attr("SameSite") == "Lax"
    with opener.open(f"http://127.0.0.1:{server.server_port}/api/runs") as again:
        assert again.status == 200
    away = ask(server, f"//evil.example/?key={server.key}")
    assert away.headers.get("location", "/").startswith("/")
    assert not away.headers.get("location", "/").startswith("//")
    split = ask(server, f"/%0d%0aSet-Cookie:%20x=1?key={server.key}")
    assert "x=1" not in split.headers.get("set-cookie", "")


@pytest.mark.parametrize(
    "path",
    [
        "/../runs/mine/config.yaml", "/run/..", "/run/mine/../mine", "/api/run/%2e%2e/outside", "/api/run/..%2foutside",
        "/sound/mine/autoencode/samples/step_000000000080/../../../secret.txt", "/sound/mine/%2e%2e/secret.flac",
        "/sound/mine/autoencode/samples/step_000000000080/leak.decoded.flac",
        "/sound/mine/autoencode/samples/step_000000000096/clip_1.decoded.flac",
        "/sound/mine/autoencode/samples/step_000000000080/dir.decoded.flac",
        "/sound/mine/autoencode/samples/step_000000000080/pipe.decoded.flac",
        "/sound/mine/autoencode/samples/step_000000000080/none.decoded.flac",
        "/sound/mine/autoencode/samples/step_000000000080/clip_1.decoded.flac%00.txt",
        "/sound/mine/autoencode/export/x/weights.safetensors", "/sound/mine/secret.txt", "/sound/mine/config.yaml",
        "/sound/link/" + SOUND, "/sound/outside/" + SOUND, "/sound//" + SOUND, "/sound/mine//" + SOUND,
        "/run/link", "/api/run/link", "/run/none", "/api/curves/none?stage=autoencode", "/api/none/mine",
        "/api/curves/mine?stage=../mine", "/api/log/mine?stage=/etc", "/api/curves/mine",
        "/assets/../server.py", "/assets/overview.html", "/assets/%2e%2e/server.py", "/none", "/run",
        "*", "x", "/\\..\\x",
    ],
)  # fmt: skip
def test_nothing_but_runs_is_reached(server, path):
    refused = ask(server, path)
    assert refused.status == 404, refused.body
    assert b"secret" not in refused.body.replace(b"secret.txt", b"")


@pytest.mark.parametrize("bound", ["x", "", "1e", "--1"])
def test_a_bound_that_is_no_number(server, bound):
    assert ask(server, f"/api/curves/mine?stage=autoencode&low={bound}&width=100").status in (200, 400)
    assert ask(server, "/api/curves/mine?stage=autoencode&width=x").status == 400


@pytest.mark.parametrize("bound", ["nan", "inf", "-inf", "1e999"])
def test_a_bound_that_is_no_finite_number(server, bound):
    answer = ask(server, f"/api/curves/mine?stage=autoencode&low={bound}&high={bound}&width={bound}")
    assert answer.status in (200, 400)


@pytest.mark.parametrize("path", ["/", "/run/mine", "/api/runs", "/none", "/assets/run.js", f"/sound/mine/{SOUND}"])
def test_every_answer_has_a_strict_policy(server, path):
    for key in (True, False):
        headers = ask(server, path, key=key).headers
        policy = dict(rule.split(" ", 1) for rule in headers["content-security-policy"].split("; "))
        assert (
            policy["default-src"]
            == policy["base-uri"]
            == policy["form-action"]
            == policy["frame-ancestors"]
            == "'none'"
        )
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert "access-control-allow-origin" not in headers


def test_assets_name_nothing_outside():
    for path in (ROOT / "launch/dashboard/assets").iterdir():
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "http" not in text.replace("https://ui", ""), path
        assert not any(
            word in text for word in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", " style=")
        )


def test_a_hostile_name_is_a_name(server):
    names = [run["name"] for run in ask(server, "/api/runs").json["runs"]]
    assert sorted(names) == sorted(["mine", "sweep/1", HOSTILE])
    assert ask(server, f"/api/run/{quote(HOSTILE)}").json["name"] == HOSTILE
    assert HOSTILE.encode() not in ask(server, f"/run/{quote(HOSTILE)}").body
    for path in ("/run/mine", f"/run/{quote(HOSTILE)}"):  # the page is the same for all runs
        assert ask(server, path).body == (ROOT / "launch/dashboard/assets/run.html").read_bytes()


def test_a_link_that_leads_out_is_told(server):
    (problem,) = ask(server, "/api/runs").json["problems"]
    assert "link leads out of" in problem


def test_head_sends_no_body(server):
    for path in ("/", "/api/runs", f"/sound/mine/{SOUND}"):
        head = ask(server, path, method="HEAD")
        assert (head.status, head.body) == (200, b"")
        assert int(head.headers["content-length"]) > 0


def test_ranges_of_a_sound(server, folder):
    content = (folder / "mine" / SOUND).read_bytes()
    whole = ask(server, f"/sound/mine/{SOUND}")
    assert (whole.status, whole.body, whole.headers["content-type"]) == (200, content, "audio/flac")
    assert whole.headers["accept-ranges"] == "bytes"
    for header, begin, end in (
        ("bytes=0-9", 0, 10),
        ("bytes=0-", 0, None),
        ("bytes=10-", 10, None),
        ("bytes=-7", -7, None),
        ("bytes=5-999999", 5, None),
    ):
        part = ask(server, f"/sound/mine/{SOUND}", Range=header)
        assert (part.status, part.body) == (206, content[begin:end])
        assert part.headers["content-range"].endswith(f"/{len(content)}")
    beyond = ask(server, f"/sound/mine/{SOUND}", Range="bytes=999999-")
    assert (beyond.status, beyond.headers["content-range"], beyond.body) == (416, f"bytes */{len(content)}", b"")


@pytest.mark.parametrize(
    "header", [None, "", "bytes=-", "bytes=9-3", "bytes=a-b", "bytes=1-2,4-5", "items=1-2", "bytes=1-2x"]
)
def test_a_malformed_range_is_the_whole(header):
    part = part_of(header, 100)
    assert part is not None
    assert (part.begin, part.end, part.is_range) == (0, 100, False)


def test_no_byte_of_an_empty_file():
    assert part_of("bytes=0-", 0) is None
    assert part_of("bytes=-0", 100) is None
    assert part_of("bytes=-0", 0) is None


def test_a_listening_page_has_a_key_of_its_own_and_a_sandbox(server):
    page = ask(server, "/api/run/mine").json["page"]
    answer = ask(server, page, key=False)
    assert answer.status == 200
    assert answer.headers["content-security-policy"].startswith("sandbox allow-scripts; default-src 'none'")
    assert ask(server, page.replace("index.html", "audio/001.js"), key=False).status == 200
    assert server.key not in page
    for wrong in (
        page.replace("index.html", "other.html"),
        page.replace("/mine/", "/sweep/1/"),
        page.replace("/listen/", "/listen/0"),
    ):
        assert ask(server, wrong, key=False).status in (403, 404)
    for path in ("config.yaml", "secret.txt", SOUND, "page/../secret.txt"):
        assert ask(server, page.replace("page/index.html", path), key=False).status in (403, 404)


def test_a_sandboxed_page_may_have_the_icon(server):
    """Some browsers ask for it in such a page, without the cookie and as another origin."""
    answer = ask(server, "/favicon.ico", key=False)
    assert (answer.status, answer.headers["content-type"]) == (200, "image/svg+xml")
    assert "cross-origin-resource-policy" not in answer.headers


def test_what_is_long_is_compressed(server):
    plain = ask(server, "/api/curves/mine?stage=autoencode")
    packed = ask(server, "/api/curves/mine?stage=autoencode", Accept_Encoding="gzip")
    assert packed.headers["content-encoding"] == "gzip"
    assert gzip.decompress(packed.body)[:20] == plain.body[:20]


def test_the_config_lacks_what_may_be_secret(tmp_path):
    add_run(tmp_path / "mine")
    text = "log: {notify: 'https://hooks.example/secret'}\ncluster: {account: secret}\nseed: 7\n"
    (tmp_path / "mine" / "config.yaml").write_text(text)
    with served(tmp_path) as server:
        shown = ask(server, "/api/config/mine").json["text"]
    assert "seed: 7" in shown
    assert "secret" not in shown


def test_the_log(server):
    answer = ask(server, "/api/log/mine").json
    assert answer == {"file": "autoencode/logs/rank_0.log", "text": "the first line\nthe last line"}


def test_a_folder_that_is_none(tmp_path, capsys):
    assert main(["dashboard", str(tmp_path / "none")]) == 2
    assert "`spresso dashboard FOLDER` takes one that holds runs" in capsys.readouterr().err


def test_a_taken_port(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert main(["dashboard", str(tmp_path), "--port", str(other.getsockname()[1])]) == 2
    assert "choose another --port" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_prints_one_line_and_ends_cleanly(tmp_path, number):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "launch.cli", "dashboard", str(tmp_path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path
    ) as process:
        assert process.stdout
        assert process.stderr
        line = process.stdout.readline()
        url = line.split(" on ")[1].split(" until ")[0]
        with urllib.request.build_opener(urllib.request.HTTPCookieProcessor()).open(url) as page:
            assert b"<title>Runs" in page.read()
        process.send_signal(number)
        assert process.wait(20) == 0
        assert (process.stdout.read(), process.stderr.read()) == ("", "")
