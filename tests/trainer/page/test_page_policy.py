"""The page's content security policy, in a browser: what the page needs works, and nothing that is slipped in runs."""

from __future__ import annotations

import http.server
import re
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.trainer.page.browser import Browser, chromium
from trainer.page import write_page

HOSTILE = "</script><img src=x onerror=alert(1)>"
MARK = "window.ran = (window.ran ?? 0) + 1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page in which every text of the run is markup."""
    root = tmp_path_factory.mktemp("report")
    systems = [
        {"key": "original", "title": HOSTILE, "role": "original"},
        {"key": f"z{HOSTILE}", "title": f'"{HOSTILE}', "role": "system", "note": HOSTILE, "detail": HOSTILE},
    ]
    names = {system["key"]: [f"{number}.flac"] for number, system in enumerate(systems)}
    for (name,) in names.values():
        soundfile.write(root / name, 0.1 * np.sin(np.arange(16_000) * 0.05), 16_000)
    figure = {"key": "f", "title": HOSTILE, "unit": HOSTILE, "better": "lower", "note": HOSTILE}
    report = {
        "recipe": HOSTILE, "subtitle": HOSTILE, "created": HOSTILE, "model_hash": "<b>&", "sample_rate": 16_000,
        "systems": systems, "figures": [figure], "results": {systems[1]["key"]: {"f": {"mean": 1.0, "std": 1.0}}},
        "speed": {"encode_realtime_factor": 2.0, "device": HOSTILE},
        "clips": [{"key": HOSTILE, "caption": HOSTILE, "seconds": 1.0, "audio": names}],
    }  # fmt: skip
    return write_page(report, root / "page", audio_root=root, curves={}, config_text=HOSTILE).parent


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("browser") / "profile") as window:
        yield window


@pytest.fixture(params=["file", "http"])
def page(request: pytest.FixtureRequest, browser: Browser, folder: Path) -> Iterator[Browser]:
    """The page, opened from disk and from a server."""
    if request.param == "file":
        browser.open(folder / "index.html")
        yield browser
        return
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser.ask("POST", "/url", {"url": f"http://127.0.0.1:{server.server_port}/index.html"})
        yield browser
        server.shutdown()


def test_the_policy_names_what_the_page_needs(folder: Path):
    text = (folder / "index.html").read_text("utf-8")
    (policy,) = re.findall(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', text)
    rules = dict(rule.split(" ", 1) for rule in policy.replace("&#x27;", "'").split("; "))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert re.fullmatch(r"'sha256-[\w+/]+=' 'strict-dynamic'", rules["script-src"])
    assert re.fullmatch(r"'sha256-[\w+/]+='", rules["style-src"])
    assert rules["img-src"] == "'self' file:"
    assert text.index("Content-Security-Policy") < text.index("<style>") < text.index("<script>")
    assert text.count("<script>") == text.count("</script>") == 1


def test_files_of_recordings_hold_no_text_of_the_run(folder: Path):
    for path in (folder / "audio").iterdir():
        assert re.fullmatch(r"[A-Za-z0-9.-]+\.js", path.name)
        assert re.fullmatch(r'spressoSound\("[A-Za-z0-9.-]+","[A-Za-z0-9+/=]+"\);\n', path.read_text())


def test_text_of_a_run_is_shown_and_does_nothing(page: Browser):
    shown = page.run("return [...document.querySelectorAll('.caption, h1, pre')].map((part) => part.textContent)")
    assert shown == [HOSTILE] * 3
    assert page.run("return document.querySelectorAll('img[onerror], img[src=x]').length") == 0
    page.click(".hint")
    assert page.run("return document.querySelector('.tip').textContent").endswith(HOSTILE)
    page.click("#continuous .play")
    page.run("while (!document.querySelector('.current.playing')) await new Promise((done) => setTimeout(done, 20))")
    assert page.run("return document.querySelector('.bar .what p').textContent") == HOSTILE
    assert page.run("return [...document.images].every((image) => image.complete && image.naturalWidth === 440)")
    assert page.run("return getComputedStyle(document.querySelector('.player')).getPropertyValue('--seconds')")
    assert page.run("return getComputedStyle(document.querySelector('.bar')).position") == "fixed"
    page.press("Escape")
    assert [error for error in page.errors() if "favicon" not in error] == []


@pytest.mark.parametrize(
    "markup",
    [
        f"<img src=x onerror='{MARK}'>",
        f"<svg onload='{MARK}'></svg>",
        f"<a href='javascript:{MARK}' id=slip>x</a>",
        f"<iframe srcdoc='<script>parent.{MARK}</script>'></iframe>",
        f"<script>{MARK}</script>",
        f"<script src='data:text/javascript,{MARK}'></script>",
    ],
)
def test_markup_that_got_in_would_not_run(browser: Browser, folder: Path, tmp_path: Path, markup: str):
    """Should text ever get into the page as markup, the policy alone stops it."""
    text = (folder / "index.html").read_text("utf-8")
    (tmp_path / "index.html").write_text(text.replace("<body", f"<body>{markup}<i", 1), "utf-8")
    browser.open(tmp_path / "index.html")
    browser.run("document.querySelector('#slip')?.click(); await new Promise((done) => setTimeout(done, 200))")
    assert browser.run("return window.ran ?? 0") == 0
    assert any("Content Security Policy" in error for error in browser.errors())


def test_nothing_leaves_or_comes_from_a_network(page: Browser):
    refused = page.run("""
      const refused = [];
      document.addEventListener("securitypolicyviolation", (event) => refused.push(event.effectiveDirective));
      await fetch("http://127.0.0.1:9/").catch(() => {});
      new Image().src = "http://127.0.0.1:9/x.png";
      new Audio("http://127.0.0.1:9/x.wav").load();
      await new Promise((done) => setTimeout(done, 300));
      return refused;
    """)
    assert sorted(refused) == ["connect-src", "img-src", "media-src"]
    page.errors()
