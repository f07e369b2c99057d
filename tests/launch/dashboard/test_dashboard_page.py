"""The dashboard's pages in a browser, while runs go on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from launch.dashboard.server import Dashboard
from tests.launch.dashboard.served_runs import add_run, add_sound, served, train_line
from tests.trainer.page.browser import Browser, chromium
from tests.trainer.page.test_page_players import RATE
from trainer.page import write_page

HOSTILE = "<img src=x onerror=window.ran=1>\"'&"
UNTIL = "for (let n = 0; n < 400 && !(%s); n += 1) await new Promise((done) => setTimeout(done, 25)); return %s"


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("browser") / "profile") as window:
        window.command("Network.enable")
        yield window


@pytest.fixture
def runs(tmp_path) -> Path:
    folder = tmp_path / "runs"
    stage = add_run(folder / "mine")
    for kind, samples in (("original", 0), ("decoded", 40), ("decoded", 80)):
        add_sound(stage, f"clip_1.{kind}.flac", samples)
    add_run(folder / "sweep" / "lr=0.1", stage="pretrain", lines=3, state="done")
    add_run(folder / HOSTILE, stage="pretrain", lines=3)
    return folder


@pytest.fixture
def server(runs, browser) -> Iterator[Dashboard]:
    with served(runs) as running:
        browser.ask("POST", "/url", {"url": running.url})
        yield running
        assert browser.errors() == []
        names = browser.run("return performance.getEntriesByType('resource').map(({ name }) => new URL(name).host)")
        assert set(names) <= {f"127.0.0.1:{running.server_port}"}
        assert browser.run("return window.ran ?? 0") == 0
        browser.ask("POST", "/url", {"url": "about:blank"})
        browser.command("Emulation.clearDeviceMetricsOverride")


def visit(browser: Browser, server: Dashboard, path: str) -> None:
    browser.ask("POST", "/url", {"url": f"http://127.0.0.1:{server.server_port}{path}"})


def until(browser: Browser, condition: str, value: str = "true") -> object:
    """Wait until a condition holds in the page, at most ten seconds; return a value, or None if it does not hold."""
    found = browser.run(UNTIL % (condition, f"({condition}) ? ({value}) : null"))
    assert found is not None, (condition, browser.run("return document.body.innerText")[:2000])
    return found


def test_the_overview_lists_runs_and_follows_them(browser, server, runs):
    names = until(
        browser,
        "document.querySelectorAll('.run .spark svg').length === 3",
        "[...document.querySelectorAll('.who a')].map((link) => link.textContent)",
    )
    assert sorted(names) == sorted(["mine", "sweep/lr=0.1", HOSTILE])
    row = "[...document.querySelectorAll('.run')].find((row) => row.querySelector('a').textContent === 'mine')"
    assert "160 of 8k" in browser.run(f"return {row}.innerText")
    status = {"stage": "autoencode", "state": "running", "samples": 4000, "of": 8000, "loss": 0.5}
    (runs / "mine" / "autoencode" / "status.json").write_text(json.dumps(status))
    until(browser, f"{row}.innerText.includes('4k of 8k')")
    add_run(runs / "later", stage="pretrain", lines=3)
    until(browser, "document.querySelectorAll('.run').length === 4")
    browser.run(
        "const find = document.querySelector('#find'); find.value = 'sweep'; find.dispatchEvent(new Event('input'))"
    )
    assert browser.run("return document.querySelectorAll('.run').length") == 1
    browser.run("document.querySelector('.run a').click()")
    until(browser, "document.querySelector('h1')?.textContent === 'sweep/lr=0.1'")
    until(browser, "document.querySelectorAll('.plot svg').length > 2")


def test_a_hostile_name_has_its_page(browser, server):
    visit(browser, server, f"/run/{quote(HOSTILE, safe='')}")
    until(browser, "document.querySelectorAll('.plot svg').length > 2")
    assert browser.run("return document.querySelector('h1').textContent") == HOSTILE
    assert browser.run("return document.querySelectorAll('img').length") == 0


LAST = "document.querySelector('.plot svg').getAttribute('aria-label')"
CAPTIONS = "[...document.querySelectorAll('#charts figcaption b')].map((title) => title.textContent)"


def test_curves_grow_while_the_run_writes_on(browser, server, runs):
    visit(browser, server, "/run/mine")
    until(browser, "document.querySelectorAll('.plot svg').length >= 4")
    assert {"loss", "terms of the loss", "directions of z", "what the codes lose of z", "learning rate"} <= set(
        browser.run(f"return {CAPTIONS}")
    )
    assert until(browser, f"{LAST}.includes('held out')", LAST) == "loss: training 0.05, held out 0.7"
    path = runs / "mine" / "autoencode" / "metrics.jsonl"
    whole = train_line(168, 0.33)
    with path.open("a") as file:  # in two parts, as a disk may show a line
        file.write(whole[:30])
        file.flush()
        file.write(whole[30:])
    until(browser, f"{LAST}.includes('training 0.33')")
    lines = path.read_text().splitlines(keepends=True)
    (path.parent / "partial").write_text("".join(lines[:10]))  # the run goes back
    (path.parent / "partial").replace(path)
    until(browser, f"{LAST} === 'loss: training 0.1'")
    with path.open("a") as file:
        file.write(train_line(88, 0.44))
    until(browser, f"{LAST} === 'loss: training 0.44'")


def test_values_by_keyboard_zoom_and_axis(browser, server):
    visit(browser, server, "/run/mine")
    until(browser, "document.querySelectorAll('.plot svg').length >= 4")
    browser.run("document.querySelector('.plot').focus()")
    readout = "document.querySelector('#charts figcaption [aria-live]').textContent"
    browser.press("Left")
    assert browser.run(f"return {readout}") == "152: training 0.052632 · held out 0.7"
    browser.press("l")
    ticks = "[...document.querySelectorAll('.plot')[0].querySelectorAll('.y')].map((tick) => tick.textContent).join()"
    assert browser.run(f"return {ticks}") == "0.5,1"
    browser.press("l")
    assert browser.run(f"return {ticks}") == "0.05,0.1,0.2,0.5,1"
    browser.press("+")
    until(browser, "!document.querySelector('#whole').hidden")
    until(browser, f"{ticks} !== '0.05,0.1,0.2,0.5,1'")
    browser.press("Escape")
    until(browser, "document.querySelector('#whole').hidden")
    browser.click(".plot", at=0.4, to=0.8)
    until(browser, "!document.querySelector('#whole').hidden")
    browser.run("document.querySelector('.legend button').click()")
    until(browser, f"{LAST} === 'loss: held out 0.7'")


def test_sounds_are_seen_and_heard(browser, server):
    visit(browser, server, "/run/mine")
    until(browser, "document.querySelectorAll('canvas').length === 2")
    browser.run("document.querySelector('canvas').scrollIntoView()")
    until(browser, "document.querySelectorAll('canvas[data-drawn]').length === 2")
    colours = browser.run(
        "const canvas = document.querySelector('canvas');"
        "const d = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;"
        "return new Set(Array.from({ length: d.length / 4 }, (_, n) => d[4 * n])).size"
    )
    assert colours > 20
    assert browser.run("return [...document.querySelector('#step').options].map((option) => option.value)") == [
        "80",
        "40",
    ]
    audio = "document.querySelectorAll('audio')[1]"
    browser.run(f"await {audio}.play()")
    until(browser, f"{audio}.currentTime > 0.2")
    assert browser.run(f"return [{audio}.duration, {audio}.error]") == [2.0, None]
    browser.run(f"{audio}.currentTime = 1.5; await new Promise((done) => {audio}.addEventListener('seeked', done))")
    assert browser.run(f"return {audio}.currentTime") >= 1.5
    browser.run(f"{audio}.pause(); document.querySelector('#step').value = '40'")
    browser.run("document.querySelector('#step').dispatchEvent(new Event('change'))")
    until(browser, "document.querySelectorAll('canvas[data-drawn]').length === 2")
    until(browser, "performance.getEntriesByType('resource').some(({ name }) => name.includes('step_000000000040'))")


def test_log_config_incidents_and_starts(browser, server, runs):
    stage = runs / "mine" / "autoencode"
    incident = {"what": "skipped a step", "position": 9, "samples": 72, "why": HOSTILE}
    (stage / "incident.json").write_text(json.dumps([incident]))
    (stage / "attempts").mkdir()
    entries = [
        {"job": "7", "restart": 0, "began": 1e9, "nodes": "n[1-2]"},
        {"job": "7", "restart": 0, "ended": 1e9 + 60, "place": 96, "then": "requeued", "why": "was preempted"},
    ]
    (stage / "attempts" / "history.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    (runs / "mine" / "config.yaml").write_text("seed: 12345\n")
    visit(browser, server, "/run/mine")
    until(browser, "document.querySelector('#starts').innerText.includes('n[1-2]')")
    assert "was preempted" in browser.run("return document.querySelector('#starts').innerText")
    assert HOSTILE in browser.run("return document.querySelector('#incidents').innerText")
    until(browser, "document.querySelectorAll('.plot')[0].querySelectorAll('.mark.requeue').length === 1")
    until(browser, "document.querySelectorAll('.plot')[0].querySelectorAll('.mark.incident').length === 1")
    browser.run("document.querySelector('#log summary').click(); document.querySelector('#config summary').click()")
    until(browser, "document.querySelector('#config-text').textContent.includes('seed: 12345')")
    until(browser, "document.querySelector('#log-text').textContent.endsWith('the last line')")
    with (stage / "logs" / "rank_0.log").open("a") as file:
        file.write(f"then {HOSTILE}\n")
    until(browser, "document.querySelector('#log-text').textContent.includes('then <img')")


def test_the_listening_page_works_in_its_sandbox(browser, server, runs, tmp_path):
    systems = [{"key": key, "title": key, "role": role} for key, role in (("o", "original"), ("z", "system"))]
    sounds = {"o": ["80/clip_1.decoded.flac"], "z": ["40/clip_1.decoded.flac"]}
    root = runs / "mine" / "autoencode" / "samples"
    for name in ("40", "80"):
        (tmp_path / name).symlink_to(root / f"step_{int(name):012}")
    report = {
        "recipe": "mine", "sample_rate": RATE, "systems": systems, "figures": [], "results": {},
        "clips": [{"key": "c", "seconds": 2.0, "audio": sounds}],
    }  # fmt: skip
    write_page(report, runs / "mine" / "page", audio_root=tmp_path, curves={}, config_text="")
    visit(browser, server, "/run/mine")
    until(browser, "!document.querySelector('#page-link').hidden")
    browser.run("document.querySelector('#page-link a').click()")
    until(browser, "document.querySelectorAll('.play').length > 0")
    until(
        browser,
        "document.images.length > 0 && [...document.images].every((image) => image.complete && image.naturalWidth)",
    )
    browser.click(".play")
    until(browser, "document.querySelector('.current.playing')")
    got = browser.run("return fetch('/api/runs').then(() => 'reached', () => 'refused')")
    assert (got, browser.run("return self.origin")) == ("refused", "null")
    browser.errors()  # of this fetch


@pytest.mark.parametrize("path", ["/", "/run/mine"])
@pytest.mark.parametrize("width", [400, 1000])
def test_nothing_is_cut_off_in_a_narrow_window(browser, server, path, width):
    visit(browser, server, path)
    browser.resize(width)
    until(browser, "document.querySelectorAll(location.pathname === '/' ? '.run .spark svg' : '.plot svg').length >= 3")
    assert browser.run("return document.documentElement.scrollWidth") <= width
    beyond = browser.run(
        "return [...document.querySelectorAll('h1, h2, p, li, a, button, canvas, audio, svg, progress, select')]"
        ".filter((part) => part.checkVisibility() && part.getBoundingClientRect().right > innerWidth + 1)"
        ".map((part) => part.outerHTML.slice(0, 80))"
    )
    assert beyond == []


def test_a_server_that_is_gone_or_another_one_is_told(browser, server):
    until(browser, "document.querySelectorAll('.run').length === 3")
    facts = "document.querySelector('#facts').textContent"
    network = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    browser.command("Network.emulateNetworkConditions", offline=True, **network)
    until(browser, f"{facts}.startsWith('no answer: does spresso dashboard still run')")
    browser.command("Network.emulateNetworkConditions", offline=False, **network)
    until(browser, f"{facts}.includes('updated')")
    server.key = "that of the next start"
    until(browser, f"{facts}.startsWith('open the whole address that `spresso dashboard` printed')")
    assert browser.run("return document.querySelectorAll('.run').length") == 3
    browser.errors()  # of the requests that failed
