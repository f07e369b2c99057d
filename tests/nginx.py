"""A real web server for the tests: nginx, with paths that are slow, fail, or refuse, as servers in the network do."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Self

import pytest

_CONFIG = """
{user}daemon off;
worker_processes 2;
pid {work}/pid;
error_log {work}/error.log;
events {{ worker_connections 256; }}
http {{
  access_log {work}/access.log combined;
  client_body_temp_path {work}/t1; proxy_temp_path {work}/t2; fastcgi_temp_path {work}/t3;
  uwsgi_temp_path {work}/t4; scgi_temp_path {work}/t5;
  split_clients "$request_id" $unlucky {{ 40% 1; * 0; }}
  server {{
    listen 127.0.0.1:{port};
    location /plain/ {{ alias {root}/; }}
    location /slow/ {{ alias {root}/; limit_rate {slow}; }}
    location /flaky/ {{ if ($unlucky) {{ return 500; }} alias {root}/; }}
    location /whole/ {{ alias {root}/; max_ranges 0; }}
    location /down/ {{ return 503; }}
    location /forbidden/ {{ return 403; }}
  }}
}}
"""


class Nginx:
    """Serves `root` at `url`/plain/ as it is; /slow/ at `slow` bytes a second and connection; /flaky/ with 500 for 40 %
    of the requests; /whole/ without ranges; /down/ and /forbidden/ never.

    Skips the test where there is no nginx, but fails with CI set.
    """

    def __init__(self, root: Path, work: Path, *, slow: int = 1 << 20):
        program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
        if program is None:
            if os.environ.get("CI"):
                raise RuntimeError("no nginx: apt-get install --no-install-recommends nginx-light")
            pytest.skip("no nginx: apt-get install --no-install-recommends nginx-light")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        work.mkdir(parents=True, exist_ok=True)
        self.work, self.url = work, f"http://127.0.0.1:{self.port}"
        user = "user root;\n" if os.geteuid() == 0 else ""  # else its workers may not read pytest's folders
        (work / "nginx.conf").write_text(_CONFIG.format(work=work, root=root, port=self.port, slow=slow, user=user))
        self._command = [program, "-p", str(work), "-c", str(work / "nginx.conf"), "-e", str(work / "error.log")]
        self.start()

    def start(self) -> None:
        """Start serving, also again after `cut_off`."""
        self._process = subprocess.Popen(self._command, start_new_session=True)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                time.sleep(0.02)
        raise RuntimeError(f"nginx did not start: {(self.work / 'error.log').read_text()}")

    def cut_off(self) -> None:
        """Kill the server in the middle of its answers."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def requests(self, name: str) -> int:
        """How often a file was asked for."""
        return sum(f"/{name} HTTP" in line for line in (self.work / "access.log").read_text().splitlines())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self.cut_off()
