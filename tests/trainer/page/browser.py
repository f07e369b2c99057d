"""A headless Chromium, driven by the few commands of the WebDriver standard that the tests need."""

from __future__ import annotations

import base64
import json
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.system_packages import BROWSER, require

_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--autoplay-policy=no-user-gesture-required",
)  # fmt: skip
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the standard's key for a reference to an element
KEYS = {
    "Left": "\ue012", "Up": "\ue013", "Right": "\ue014", "Down": "\ue015", "Escape": "\ue00c", "Shift": "\ue008",
    "Tab": "\ue004", "Enter": "\ue007",
}  # fmt: skip


class Browser:
    """A browser with one window."""

    def __init__(self, driver: str) -> None:
        self._driver = driver
        self._session = ""

    def start(self, profile: Path) -> None:
        """Open the window, with the browser's profile in the given folder."""
        options = {"args": [*_FLAGS, f"--user-data-dir={profile}"]}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        session = self._ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self._session = f"/session/{session['sessionId']}"

    def open(self, page: Path, *, width: int = 1440, height: int = 900) -> None:
        """Show a file, opened from disk."""
        self.ask("POST", "/window/rect", {"width": width, "height": height})
        self.ask("POST", "/url", {"url": page.resolve().as_uri()})

    def resize(self, width: int, height: int = 800) -> None:
        """Set the page's size in pixels, which may be below a window's minimum; a narrow page acts like a phone's."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 700}
        self.command("Emulation.setDeviceMetricsOverride", **size)

    def command(self, name: str, **parameters: object) -> Any:
        """Send a command of Chromium's own protocol."""
        return self.ask("POST", "/goog/cdp/execute", {"cmd": name, "params": parameters})

    def run(self, script: str, *arguments: object) -> Any:
        """Run the body of an async function in the page and return its result."""
        wrapped = (
            "const done = arguments[arguments.length - 1];"
            f"(async (...given) => {{ {script} }})(...[...arguments].slice(0, -1))"
            ".then((value) => done([value ?? null, null]), (error) => done([null, String(error)]));"
        )
        value, error = self.ask("POST", "/execute/async", {"script": wrapped, "args": arguments})
        assert error is None, error
        return value

    def click(self, selector: str, *, at: float | None = None, to: float | None = None) -> None:
        """Click an element with the pointer, `at` a fraction of its width, or drag from `at` to `to`."""
        size = self.run(
            "const e = document.querySelector(given[0]); e.scrollIntoView({block: 'center'});"
            "return e.getBoundingClientRect().width", selector,
        )  # fmt: skip
        origin = self.ask("POST", "/element", {"using": "css selector", "value": selector})
        moves = [self._move(origin, size, 0.5 if at is None else at), {"type": "pointerDown", "button": 0}]
        moves += [] if to is None else [self._move(origin, size, to)]
        self._act({"type": "pointer", "actions": [*moves, {"type": "pointerUp", "button": 0}]})

    def press(self, *keys: str) -> None:
        """Press keys one after another, or all together if the first is Shift."""
        names = [KEYS.get(key, key) for key in keys]
        ordered = [("keyDown", names[0]), *self._strokes(names[1:]), ("keyUp", names[0])]
        chosen = ordered if keys[0] == "Shift" else self._strokes(names)
        self._act({"type": "key", "actions": [{"type": kind, "value": value} for kind, value in chosen]})

    def errors(self) -> list[str]:
        """Return the warnings and errors that the page wrote to the console since the last call."""
        entries = self.ask("POST", "/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] in ("SEVERE", "WARNING")]

    def screenshot(self, path: Path) -> None:
        """Save the window as a PNG."""
        path.write_bytes(base64.b64decode(self.ask("GET", "/screenshot")))

    def ask(self, method: str, command: str, body: dict[str, Any] | None = None) -> Any:
        """Send a WebDriver command to this window and return its value."""
        return self._ask(method, self._session + command, body)

    @staticmethod
    def _strokes(names: list[str]) -> list[tuple[str, str]]:
        return [(kind, name) for name in names for kind in ("keyDown", "keyUp")]

    @staticmethod
    def _move(origin: dict[str, str], width: float, at: float) -> dict[str, Any]:
        return {"type": "pointerMove", "duration": 0, "origin": origin, "x": round((at - 0.5) * width), "y": 0}

    def _act(self, device: dict[str, Any]) -> None:
        self.ask("POST", "/actions", {"actions": [{"id": device["type"], **device}]})

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = json.dumps(body or {}).encode() if method == "POST" else None
        request = urllib.request.Request(self._driver + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{method} {path}: {error.read().decode()[:600]}") from None


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """A browser for the length of a `with`; where there is none the test is skipped."""
    require(*BROWSER)
    driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert driver.stdout
    try:
        port = next(line.split()[-1].rstrip(".") for line in driver.stdout if "started successfully on port" in line)
        browser = Browser(f"http://127.0.0.1:{port}")
        browser.start(profile)
        yield browser
        browser.ask("DELETE", "")
    finally:
        driver.terminate()
        driver.wait(10)
