"""The server of `spresso dashboard`: HTTP on the loopback address, GET and HEAD alone, for whoever has the key.

Other users of the machine can reach its loopback address, too, so that the address that is printed holds a key, as
Jupyter's does; the browser keeps the key in a cookie. A web page that makes its own name lead to this machine (DNS
rebinding) is told apart by the header `Host`. A listening page runs in a sandbox, under a key of its own.
"""

from __future__ import annotations

import gzip
import hashlib
import hmac
import json
import os
import re
import secrets
import signal
import socket
import sys
import time
from contextlib import suppress
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from launch.dashboard import served_files
from launch.dashboard.curve_store import CurveStore
from launch.dashboard.overview import Overview
from launch.dashboard.run_details import config_text, details, log_end
from launch.error_line import describe_error
from models.documents import opened
from trainer import page as listening_page
from trainer.file_names import printable
from trainer.stages import STAGES

HOST = "127.0.0.1"
PORT = 8017
_READING = 0.5  # seconds of reading for an answer of the overview
_IDLE = 30.0  # seconds after which a connection without a request is closed
_PIECE = 1 << 16
_ASSETS = {
    **dict.fromkeys(
        ("dashboard.css", "common.js", "overview.js", "chart.js", "listen.js", "run.js", "icon.svg"),
        Path(__file__).with_name("assets"),
    ),
    "page.css": Path(listening_page.__file__).with_name("assets"),
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; media-src 'self' blob:; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_PAGE_POLICY = (
    "sandbox allow-scripts; default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Of a listening page, which brings a stricter one. In a sandbox, it can read nothing else of this server."""
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_ALLOWED = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d{1,5})?", re.IGNORECASE)
"""What a browser may call this machine; the port is another one behind `ssh -L`."""


class Refused(Exception):
    """A request that is not answered, with the status and a line that says why."""

    def __init__(self, status: HTTPStatus, why: str) -> None:
        super().__init__(why)
        self.status = status


class Dashboard(ThreadingHTTPServer):
    """The server, with what is known of the runs.

    Attributes:
        key: what a request has to bring.
        root: the folder of runs, links followed.
    """

    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True

    def __init__(self, folder: Path, *, port: int) -> None:
        super().__init__((HOST, port), _Handler)
        self.root, self.key = folder.resolve(), secrets.token_urlsafe(18)
        self.overview, self.curves = Overview(self.root), CurveStore()

    @property
    def url(self) -> str:
        """The address with the key."""
        return f"http://{HOST}:{self.server_port}/?key={self.key}"

    @property
    def cookie(self) -> str:
        """Name of the cookie that holds the key. Browsers do not tell the ports of a host apart, hence the port."""
        return f"spresso-{self.server_port}"

    def page_key(self, run: str) -> str:
        """Return the key of a run's listening page, from which the server's key can't be found."""
        return hmac.new(self.key.encode(), run.encode(), hashlib.sha256).hexdigest()[:32]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Pass over a connection that the browser has closed; name any other error in a line."""
        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError | TimeoutError):
            print(f"spresso dashboard: {type(error).__name__}: {printable(str(error))}", file=sys.stderr)


def serve(folder: Path, *, port: int | None) -> None:
    """Serve a folder of runs until Ctrl-C or SIGTERM, and print the address.

    Args:
        folder: the folder; its runs may come later.
        port: the port; None: `PORT`, or a free one if it is taken.

    Raises:
        ValueError: there is no such folder.
        OSError: the port is taken.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}: `spresso dashboard FOLDER` takes one that holds runs")
    with _bound(folder, port) as server:
        before = signal.signal(signal.SIGTERM, _end)
        print(f"following the runs in {printable(str(folder))} on {server.url} until Ctrl-C", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            pass
        finally:
            signal.signal(signal.SIGTERM, before)


def _bound(folder: Path, port: int | None) -> Dashboard:
    try:
        return Dashboard(folder, port=PORT if port is None else port)
    except OSError as error:
        if port is not None:
            raise OSError(
                error.errno, f"{error.strerror}: choose another --port, or leave it out", f"port {port}"
            ) from None
    return Dashboard(folder, port=0)


def _end(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


class _Handler(BaseHTTPRequestHandler):
    """Answers a request."""

    server: Dashboard
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "spresso", ""
    timeout = _IDLE

    def setup(self) -> None:
        """See the base; small answers are sent at once."""
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)

    def parse_request(self) -> bool:
        """See the base; refuse methods that could change something, and bodies."""
        if not super().parse_request():
            return False
        has_body = self.headers.get("Content-Length", "0") != "0" or "Transfer-Encoding" in self.headers
        if self.command in ("GET", "HEAD") and not has_body:
            return True
        self.close_connection = True
        self._send(
            HTTPStatus.METHOD_NOT_ALLOWED, "text/plain; charset=utf-8", b"GET and HEAD alone\n", Allow="GET, HEAD"
        )
        return False

    def do_GET(self) -> None:
        """Answer a request, or say in a line why not."""
        try:
            self._answer()
        except Refused as refused:
            self._text(refused.status, str(refused))
        except (ValueError, OSError) as error:
            if isinstance(error, ConnectionError | TimeoutError):
                raise
            self._text(HTTPStatus.INTERNAL_SERVER_ERROR, describe_error(error))

    do_HEAD = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Write no log: a page asks every second or two."""

    # ---- what is asked for

    def _answer(self) -> None:
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1 or not _ALLOWED.fullmatch(hosts[0].strip()):
            raise Refused(HTTPStatus.MISDIRECTED_REQUEST, "this server answers for 127.0.0.1 and localhost alone")
        target = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(target.query).items()}
        words = [unquote(word, errors="surrogateescape") for word in target.path.split("/")[1:]]
        if not words or any(word in (".", "..") or "/" in word or "\0" in word for word in words):
            raise Refused(HTTPStatus.NOT_FOUND, "there is no such page")
        if words[0] == "listen" and len(words) > 2:
            self._listening_page(words[1], words[2:])
            return
        if words == ["favicon.ico"]:  # a browser asks for a sandboxed page's, as a stranger without the cookie
            self._file(_ASSETS["icon.svg"] / "icon.svg", policy=_PAGE_POLICY)
            return
        self._require_key(query)
        if "key" in query:
            self._enter()
            return
        match words:
            case [""]:
                self._file(Path(__file__).with_name("assets") / "overview.html")
            case ["assets", name] if name in _ASSETS:
                self._file(_ASSETS[name] / name)
            case ["api", "runs"]:
                self._json(self.server.overview.rows(seconds=_READING))
            case ["run", *name]:
                self._run(name)
                self._file(Path(__file__).with_name("assets") / "run.html")
            case ["api", what, *name]:
                self._json(self._of_run(what, *self._run(name), query))
            case ["sound", *rest]:
                self._sound(rest)
            case _:
                raise Refused(HTTPStatus.NOT_FOUND, "there is no such page")

    def _require_key(self, query: dict[str, str]) -> None:
        """Refuse a request without the key, in the address or in the cookie."""
        cookies: SimpleCookie = SimpleCookie()
        with suppress(CookieError):
            cookies.load(self.headers.get("Cookie", ""))
        given = query.get("key") or (cookies[self.server.cookie].value if self.server.cookie in cookies else "")
        if not hmac.compare_digest(given.encode("utf-8", "replace"), self.server.key.encode()):
            raise Refused(
                HTTPStatus.FORBIDDEN, "open the whole address that `spresso dashboard` printed: it holds a key"
            )

    def _enter(self) -> None:
        """Put the key into a cookie, and take it out of the address bar."""
        cookie = f"{self.server.cookie}={self.server.key}; Path=/; HttpOnly; SameSite=Lax"
        path = quote(unquote(urlsplit(self.path).path)) or "/"
        self._send(
            HTTPStatus.SEE_OTHER, "text/plain; charset=utf-8", b"", Location=f"/{path.lstrip('/')}", Set_Cookie=cookie
        )

    def _run(self, words: list[str]) -> tuple[str, Path]:
        """Return the name and the directory of a run that was found; the path alone leads nowhere else."""
        name = "/".join(words)
        path = self.server.overview.path(name)
        if path is None:
            raise Refused(HTTPStatus.NOT_FOUND, "there is no such run (any more)")
        return name, path

    def _of_run(self, what: str, name: str, run: Path, query: dict[str, str]) -> dict[str, Any]:
        stage = query.get("stage")
        if stage is not None and stage not in STAGES:
            raise Refused(HTTPStatus.NOT_FOUND, "there is no such stage")
        match what:
            case "run":
                listen = f"/listen/{self.server.page_key(name)}/{quote(name)}/page/index.html"
                found = details(run, self.server.overview.stages(name))
                return {"name": name, "time": time.time(), **found, "page": listen if found["page"] else ""}
            case "curves" if stage is not None:
                bounds = {key: _number(query[key]) for key in ("low", "high") if key in query}
                width = int(min(4000, max(50, _number(query.get("width", "600")))))
                path = run / stage / "metrics.jsonl"
                return self.server.curves.answer(path, since=query.get("since", ""), width=width, **bounds)
            case "config":
                return {"text": config_text(run)}
            case "log":
                return log_end(run, stage)
        raise Refused(HTTPStatus.NOT_FOUND, "there is no such page")

    def _sound(self, words: list[str]) -> None:
        """Send a sound: the words are those of the run's name and of the path, which has four."""
        _, run = self._run(words[:-4])
        path = served_files.sound(self.server.root, run, "/".join(words[-4:]))
        if path is None:
            raise Refused(HTTPStatus.NOT_FOUND, "there is no such sound (any more)")
        self._file(path)

    def _listening_page(self, key: str, words: list[str]) -> None:
        """Send a file of a listening page, whose own key takes the place of a cookie: a sandbox sends none."""
        if "page" not in words:
            raise Refused(HTTPStatus.NOT_FOUND, "there is no such page")
        split = len(words) - 1 - words[::-1].index("page")
        name, path = "/".join(words[:split]), "/".join(words[split:])
        if not hmac.compare_digest(key.encode("utf-8", "replace"), self.server.page_key(name).encode()):
            raise Refused(HTTPStatus.FORBIDDEN, "open this page from the run's page")
        _, run = self._run(words[:split])
        file = served_files.page_file(self.server.root, run, path)
        if file is None:
            raise Refused(HTTPStatus.NOT_FOUND, "there is no such page (any more)")
        self._file(file, policy=_PAGE_POLICY)

    # ---- how it is sent

    def _text(self, status: HTTPStatus, text: str) -> None:
        self._send(status, "text/plain; charset=utf-8", (printable(text) + "\n").encode())

    def _json(self, value: dict[str, Any]) -> None:
        content = json.dumps(value, allow_nan=False).encode()
        if "gzip" in self.headers.get("Accept-Encoding", "") and len(content) > 1024:  # for `ssh -L` over slow lines
            self._send(HTTPStatus.OK, "application/json", gzip.compress(content, 1), Content_Encoding="gzip")
        else:
            self._send(HTTPStatus.OK, "application/json", content)

    def _file(self, path: Path, *, policy: str = _POLICY) -> None:
        """Send a file, or the range of it that is asked for."""
        try:
            with opened(path) as file:
                part = served_files.part_of(self.headers.get("Range"), os.fstat(file.fileno()).st_size)
                if part is None:
                    size = os.fstat(file.fileno()).st_size
                    self._begin(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, 0, Content_Range=f"bytes */{size}")
                    return
                status, extra = (
                    (HTTPStatus.PARTIAL_CONTENT, {"Content_Range": part.header})
                    if part.is_range
                    else (HTTPStatus.OK, {})
                )
                self._begin(
                    status, part.end - part.begin, policy=policy, Content_Type=served_files.content_type(path),
                    Accept_Ranges="bytes", **extra,
                )  # fmt: skip
                if self.command == "GET":
                    self._copy(file, part)
        except (FileNotFoundError, NotADirectoryError):
            raise Refused(HTTPStatus.NOT_FOUND, "there is no such file (any more)") from None

    def _copy(self, file: Any, part: served_files.ByteRange) -> None:
        file.seek(part.begin)
        left = part.end - part.begin
        while left and (piece := file.read(min(left, _PIECE))):
            self.wfile.write(piece)
            left -= len(piece)
        self.close_connection = self.close_connection or left > 0  # a file that became shorter

    def _send(self, status: HTTPStatus, kind: str, content: bytes, **headers: str) -> None:
        self._begin(status, len(content), Content_Type=kind, **headers)
        if self.command != "HEAD":
            self.wfile.write(content)

    def _begin(self, status: HTTPStatus, length: int, *, policy: str = _POLICY, **headers: str) -> None:
        """Send the head of an answer; underscores in names of headers stand for hyphens."""
        self.send_response(status)
        # a sandboxed page has no origin, so its own files would be refused as another origin's
        same = {} if policy == _PAGE_POLICY else {"Cross-Origin-Resource-Policy": "same-origin"}
        every = _HEADERS | same | {"Content-Security-Policy": policy, "Content-Length": str(length)}
        for name, value in (every | {name.replace("_", "-"): value for name, value in headers.items()}).items():
            self.send_header(name, value)
        self.end_headers()


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise Refused(HTTPStatus.BAD_REQUEST, "a bound of the curves is no number") from None
