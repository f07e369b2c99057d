"""Real stores for the tests: an S3 server (moto's) and WebDAV (nginx), behind a proxy that fails as networks do."""

from __future__ import annotations

import http.client
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self

from tests.system_packages import PATH, require

SECRET = "wJalrXUtnFEMI-a-secret-of-the-tests"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "AKIATESTS",
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_MAX_ATTEMPTS": "1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
SHORT = ("pretrain.samples=96", "log.every=8", "checkpoint.every=32", "checkpoint.least_steps=1")
"""Settings of a run that is short and saves often."""
_MODULES = Path("/usr/lib/nginx/modules")
_WEBDAV = """
load_module {modules}/ngx_http_dav_ext_module.so;
{user}daemon off;
worker_processes 1;
pid {work}/pid;
error_log {work}/error.log;
events {{ worker_connections 64; }}
http {{
  access_log off;
  client_max_body_size 0;
  client_body_temp_path {work}/t1; proxy_temp_path {work}/t2; fastcgi_temp_path {work}/t3;
  uwsgi_temp_path {work}/t4; scgi_temp_path {work}/t5;
  server {{
    listen 127.0.0.1:{port};
    location / {{ root {root}; dav_methods PUT DELETE MKCOL COPY MOVE; dav_ext_methods PROPFIND OPTIONS; }}
  }}
}}
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A server in a process of its own, which can be killed and started again on its port."""

    def __init__(self, port: int, command: list[str], environment: dict[str, str] | None = None) -> None:
        self.port, self.url = port, f"http://127.0.0.1:{port}"
        self._command, self._environment = command, environment
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(
            self._command,
            env=self._environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                time.sleep(0.05)
        raise RuntimeError(f"{self._command[0]} did not start")

    def kill(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


class S3(Server):
    """An S3 server, with one bucket."""

    bucket = "bucket"

    def __init__(self, host: str = "127.0.0.1") -> None:
        """Start the server, at an address of this machine; `0.0.0.0` stands for all of them."""
        port = free_port()
        command = [sys.executable, "-m", "moto.server", "-H", host, "-p", str(port)]
        super().__init__(port, command, {**os.environ, **ENVIRONMENT})
        self.reset()

    def reset(self) -> None:
        """Forget everything but the empty bucket."""
        for method, path in (("POST", "/moto-api/reset"), ("PUT", f"/{self.bucket}")):
            urllib.request.urlopen(urllib.request.Request(f"{self.url}{path}", method=method, data=b"")).close()


class WebDAV(Server):
    """nginx as a WebDAV server of a folder. A test that uses it is skipped where there is none."""

    def __init__(self, root: Path, work: Path) -> None:
        require("nginx-light", "libnginx-mod-http-dav-ext")
        work.mkdir(parents=True)
        port, user = free_port(), "user root;\n" if os.geteuid() == 0 else ""
        config = _WEBDAV.format(modules=_MODULES, user=user, work=work, root=root, port=port)
        (work / "nginx.conf").write_text(config)
        program = str(shutil.which("nginx", path=PATH))
        super().__init__(port, [program, "-p", f"{work}", "-c", f"{work}/nginx.conf", "-e", f"{work}/error.log"])


Fault = Callable[[str, str], str]
"""Method and path of a request → what goes wrong: an HTTP status, `cut`, `gate`, or nothing."""


class Proxy:
    """Passes requests on to a server, except where `fault` says what goes wrong.

    Attributes:
        fault: decides on each request; see `Fault`.
        gate: requests with the fault `gate` wait until it is set, and then pass.
        at_gate: is set once a request waits there.
        requests: the requests that came, as `METHOD PATH`.
    """

    def __init__(self, server: Server) -> None:
        self.fault: Fault = lambda method, path: ""
        self.gate, self.at_gate = threading.Event(), threading.Event()
        self.requests: list[str] = []
        self.server = server
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def asked(self, pattern: str) -> list[str]:
        """The requests that match a regular expression."""
        return [request for request in self.requests if re.search(pattern, request)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.gate.set()
        self._http.shutdown()
        self._http.server_close()


def _handler(proxy: Proxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def handle_one_request(self) -> None:
            try:
                super().handle_one_request()
            except (ConnectionError, BrokenPipeError):
                self.close_connection = True

        def __getattr__(self, name: str):
            if name.startswith("do_"):
                return self._pass_on
            raise AttributeError(name)

        def log_message(self, *_: object) -> None:
            pass

        def _pass_on(self) -> None:
            proxy.requests.append(f"{self.command} {self.path}")
            fault = proxy.fault(self.command, self.path)
            if fault == "gate":
                proxy.at_gate.set()
                proxy.gate.wait(60)
            length = int(self.headers.get("Content-Length") or 0)
            if fault == "cut" and length:
                self.rfile.read(length // 2)
                return self._cut()
            body = self._chunks() if "chunked" in self.headers.get("Transfer-Encoding", "") else self.rfile.read(length)
            if fault.isdecimal():
                return self._answer(int(fault), {}, _ERRORS[fault].encode())
            connection = http.client.HTTPConnection("127.0.0.1", proxy.server.port, timeout=60)
            try:
                kept = {name: value for name, value in self.headers.items() if name.lower() not in _OWN}
                connection.request(self.command, self.path, body, {**kept, "Content-Length": str(len(body))})
                answer = connection.getresponse()
                content = answer.read()
            except OSError:
                return self._cut()
            finally:
                connection.close()
            named = {name: value for name, value in answer.getheaders() if name.lower() not in _OWN}
            if self.command == "HEAD":
                named["Content-Length"] = answer.getheader("Content-Length") or "0"
            self._answer(answer.status, named, content, cut=fault == "cut")

        def _answer(self, status: int, headers: dict[str, str], content: bytes, *, cut: bool = False) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            if "Content-Length" not in headers:
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content[: len(content) // 2] if cut else content)
            if cut:
                self._cut()

        def _cut(self) -> None:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

        def _chunks(self) -> bytes:
            content = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content

    return Handler


_OWN = ("content-length", "transfer-encoding", "connection", "host", "expect", "server", "date", "keep-alive")
_ERROR = '<?xml version="1.0"?><Error><Code>{}</Code><Message>{}</Message></Error>'
_ERRORS = {
    "500": _ERROR.format("InternalError", "We encountered an internal error. Please try again."),
    "503": _ERROR.format("SlowDown", "Please reduce your request rate."),
    "403": _ERROR.format("InvalidAccessKeyId", "The key does not exist in our records."),
}
