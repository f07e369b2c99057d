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

from tests.system_packages import PATH, require

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

    A test that uses it is skipped where there is no nginx.
    """

    def __init__(self, root: Path, work: Path, *, slow: int = 1 << 20):
        require("nginx-light")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        work.mkdir(parents=True, exist_ok=True)
        self.work, self.url = work, f"http://127.0.0.1:{self.port}"
        user = "user root;\n" if os.geteuid() == 0 else ""  # else its workers may not read pytest's folders
        (work / "nginx.conf").write_text(_CONFIG.format(work=work, root=root, port=self.port, slow=slow, user=user))
        program = shutil.which("nginx", path=PATH)
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

    def logged(self, text: str) -> bool:
        """Whether it logged this within 5 s: the line of a request is written after its answer has been sent."""
        deadline = time.monotonic() + 5
        while text not in (self.work / "access.log").read_text():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    def requests(self, name: str) -> int:
        """How often a file was asked for."""
        return sum(f"/{name} HTTP" in line for line in (self.work / "access.log").read_text().splitlines())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self.cut_off()
