"""The listening page in a browser, opened from disk: what is heard, sample by sample, and what is seen and pressed."""

from __future__ import annotations

import base64
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from tests.trainer.page.browser import Browser, chromium
from trainer.page import write_page

RATE = 16_000
SECONDS = 6.0
LEVELS = {"original": 1.0, "z": 0.5, "zq": 0.7}  # the same noise, told apart by its level
RECORDER = """
  class Recorder extends AudioWorkletProcessor {
    process([[samples]]) { this.port.postMessage(samples?.slice() ?? new Float32Array(128)); return true; }
  }
  registerProcessor("recorder", Recorder);
"""
TAP = """
  const script = "data:text/javascript," + encodeURIComponent(given[0]);
  window.heard = [];
  window.loads = [];
  new MutationObserver((changes) => {
    const added = changes.flatMap((change) => [...change.addedNodes]);
    loads.push(...added.filter((node) => node.src).map((node) => node.getAttribute("src")));
  }).observe(document.head, { childList: true });
  window.AudioContext = class extends AudioContext {
    #gate = new GainNode(this);
    constructor(options) {
      super(options);
      this.#gate.connect(super.destination);
      this.audioWorklet.addModule(script).then(() => {
        const recorder = new AudioWorkletNode(this, "recorder", { numberOfOutputs: 0 });
        recorder.port.onmessage = ({ data }) => heard.push(data);
        this.#gate.connect(recorder);
        window.tapped = this;
      });
    }
    get destination() { return this.#gate; }
  };
"""
HEARD = """
  const bytes = new Uint8Array(await new Blob(heard).arrayBuffer());
  let text = "";
  for (let i = 0; i < bytes.length; i += 4096) text += String.fromCharCode(...bytes.subarray(i, i + 4096));
  return btoa(text);
"""
ZQ = '[data-sound*="bell-zq"]'  # of the first clip
Z = '[data-sound*="bell-z"]'


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("browser") / "profile") as window:
        yield window


@pytest.fixture(scope="module")
def sounds() -> dict[str, NDArray[np.float32]]:
    """Of each clip a noise that is nowhere like itself, so that a piece of it tells its place."""
    generator = np.random.default_rng(0)
    return {key: (0.1 * generator.standard_normal(round(RATE * SECONDS))).clip(-0.4, 0.4) for key in ("bell", "wind")}


@pytest.fixture(scope="module")
def folder(sounds, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("report")
    systems = [
        {"key": "original", "title": "Original", "role": "original"},
        {"key": "z", "title": "Continuous z", "role": "system"},
        {"key": "zq", "title": "Codes", "role": "system", "payload_kbps": 0.3, "table": "continuous"},
    ]
    clips = []
    for key, sound in sounds.items():
        audio = {}
        for system, level in LEVELS.items():
            audio[system] = [f"{key}.{system}.{take}.flac" for take in range(3 if system == "zq" else 1)]
            for take, name in enumerate(audio[system]):
                soundfile.write(root / name, sound * (level - 0.2 * take), RATE)
        clips.append({"key": key, "caption": f"A {key}", "seconds": SECONDS, "audio": audio})
    report = {
        "recipe": "demo", "sample_rate": RATE, "systems": systems, "clips": clips, "results": {}, "figures": [],
    }  # fmt: skip
    return write_page(report, root / "page", audio_root=root, curves={}, config_text="seed: 1").parent


@pytest.fixture
def page(browser, folder) -> Browser:
    """The page just opened, its sound recorded as the device gets it. The test has to leave no error behind."""
    browser.open(folder / "index.html")
    browser.run(TAP, RECORDER)
    yield browser
    assert browser.errors() == []


# ---- what is heard


def recorded(page: Browser) -> NDArray[np.float32]:
    return np.frombuffer(base64.b64decode(page.run(HEARD)), np.float32)


def until(page: Browser, condition: str, *, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not page.run(f"return {condition}"):
        assert time.monotonic() < end, f"never: {condition}"


def position(page: Browser) -> float:
    return page.run("return Number(document.querySelector('.current input').value)")


def play_on(page: Browser, seconds: float) -> None:
    """Let so much more of the sound be heard."""
    start = page.run("return heard.length")
    until(page, f"heard.length > {start + seconds * RATE / 128}")


def place_of(piece: NDArray[np.float32], sound: NDArray[np.float32]) -> tuple[int, float]:
    """Where in a sound a piece lies, to the sample, and how loud it is beside it."""
    size = len(sound) + len(piece)
    likeness = np.fft.irfft(np.fft.rfft(sound, size) * np.fft.rfft(piece, size).conj(), size)[: len(sound)]
    start = int(likeness.argmax())
    original = sound[start : start + len(piece)]
    return start, float(piece[: len(original)] @ original / (original @ original))


def begin(page: Browser, player: str = "#continuous .player") -> None:
    """Start a player, and wait until its sound is recorded and all of its clip has been fetched."""
    page.click(f"{player} .play")
    until(page, "window.tapped && document.querySelectorAll('.current.playing').length && heard.length > 20")
    until(page, "loads.length >= 3 && !document.head.querySelector('script')")


def test_a_player_plays_what_the_file_holds_as_loud_as_it_is(page, sounds):
    begin(page)
    first = position(page)
    play_on(page, 0.3)
    assert position(page) > first + 0.2
    start, level = place_of(recorded(page)[-4000:], sounds["bell"])
    assert level == pytest.approx(1, abs=1e-3)
    assert np.abs(recorded(page)[-4000:]).max() > 0.2
    assert start > 0


def switch(page: Browser, change, sound: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The level in each millisecond around a change, and how far the sound's place is from where it was to be."""
    play_on(page, 0.3)
    start = page.run("return 128 * heard.length") - RATE // 5
    change()
    play_on(page, 0.4)
    heard = recorded(page)[start:]
    start, _ = place_of(heard[: RATE // 10], sound)
    expected = sound[start : start + len(heard)]
    pieces = [slice(i, i + RATE // 20) for i in range(0, len(expected) - RATE // 20, RATE // 20)]
    moved = np.array([place_of(heard[piece], sound)[0] - piece.start - start for piece in pieces]) / RATE
    windows = [slice(i, i + RATE // 1000) for i in range(0, len(expected) - RATE // 1000, RATE // 1000)]
    levels = np.array([heard[w] @ expected[w] / (expected[w] @ expected[w]) for w in windows])
    return levels, moved


@pytest.mark.parametrize(
    ("change", "level"),
    [
        pytest.param(lambda page: page.click(f"#continuous {Z} .play"), 0.5, id="button"),
        pytest.param(lambda page: page.press("Right"), 0.5, id="key"),
        pytest.param(lambda page: page.click(".bar .systems button:nth-child(3)"), 0.7, id="bar"),
        pytest.param(lambda page: page.click(f"#continuous {ZQ} .takes button:nth-child(2)"), 0.5, id="take"),
    ],
)
def test_another_system_goes_on_at_the_same_place_without_gap_or_click(page, sounds, change, level):
    begin(page)
    levels, moved = switch(page, lambda: change(page), sounds["bell"])
    assert np.abs(moved).max() < 1 / RATE  # to the sample; 20 ms would do
    assert levels[:50] == pytest.approx(1, abs=0.01)
    assert levels[-50:] == pytest.approx(level, abs=0.01)
    assert levels.min() > 0.98 * level  # silence would be 0
    assert levels.max() < 1.02
    assert np.abs(np.diff(levels)).max() < 0.3 * (1 - level)  # a click: half of it at least


def test_pressed_in_haste_the_last_system_stays_and_one_alone_sounds(page, sounds):
    begin(page)
    page.press("Right", "Left", "Right", "Right", "Left", "Left", "Right")
    levels, moved = switch(page, lambda: None, sounds["bell"])
    assert levels == pytest.approx(0.5, abs=0.01)
    assert np.abs(moved).max() < 1 / RATE


def test_a_press_on_a_spectrogram_seeks_there_and_a_drag_follows(page, sounds):
    begin(page)
    page.click("#continuous .current .track", at=0.5)
    play_on(page, 0.2)
    start, _ = place_of(recorded(page)[-1600:], sounds["bell"])
    assert 0.5 * SECONDS < start / RATE + 0.1 < 0.5 * SECONDS + 1
    page.click(f"#continuous {ZQ} .track", at=0.8, to=0.25)  # of another system
    play_on(page, 0.2)
    start, level = place_of(recorded(page)[-1600:], sounds["bell"])
    assert level == pytest.approx(0.7, abs=0.01)
    assert 0.25 * SECONDS < start / RATE + 0.1 < 0.25 * SECONDS + 1


def test_until_its_sound_is_there_the_last_one_goes_on_and_the_latest_wish_counts(page, sounds):
    page.run("""
      const append = document.head.append;
      document.head.append = (script) => {
        const wait = script.src.endsWith("bell-z.js") ? 900 : script.src.includes("1-bell-zq") ? 500 : 0;
        setTimeout(() => append.call(document.head, script), wait);
      };
    """)
    page.click("#continuous .play")
    until(page, "window.tapped && heard.length > 20")

    def change() -> None:
        page.run("for (const name of given) document.querySelector(name).click()", f"{Z} .play", f"{ZQ} .play")
        until(page, "!document.querySelector('.loading') && loads.length === 5")

    levels, moved = switch(page, change, sounds["bell"])
    assert np.abs(moved).max() < 1 / RATE
    assert levels[:350] == pytest.approx(1, abs=0.01)
    assert levels[-50:] == pytest.approx(0.7, abs=0.01)
    assert levels.min() > 0.69


def test_a_pause_keeps_the_place_and_another_clip_begins_anew(page, sounds):
    begin(page)
    page.click("#continuous .current .track", at=0.4)
    play_on(page, 0.2)
    page.press(" ")
    until(page, "!document.querySelector('.playing')")
    page.press("Right")  # without a sound
    play_on(page, 0.2)
    assert not recorded(page)[-1600:].any()
    place = position(page)
    page.press(" ")
    play_on(page, 0.15)
    start, level = place_of(recorded(page)[-1600:], sounds["bell"])
    assert level == pytest.approx(0.5, abs=0.01)
    assert 0.4 * SECONDS < place < start / RATE + 0.1 < place + 1
    page.press("Down")
    until(page, "document.querySelector('.here').dataset.clip === 'wind'")
    play_on(page, 0.25)
    start, level = place_of(recorded(page)[-1600:], sounds["wind"])
    assert level == pytest.approx(0.5, abs=0.01)
    assert start / RATE < 1.5


def test_a_loop_goes_round_and_without_it_the_end_is_the_end(page, sounds):
    begin(page)
    page.click("#continuous .current .track", at=0.9)
    page.press("l")  # while it plays
    play_on(page, 1)
    heard = recorded(page)[-RATE // 2 :]
    start, level = place_of(heard[-1600:], sounds["bell"])
    assert level == pytest.approx(1, abs=0.01)
    assert start / RATE - 0.1 < position(page) < 3
    page.click("#continuous .current .track", at=0.95)
    page.press("l")
    until(page, "!document.querySelector('.playing')")
    play_on(page, 0.1)
    assert not recorded(page)[-800:].any()
    assert position(page) == 0


# ---- what is loaded, seen and pressed


def test_nothing_is_loaded_before_it_is_asked_for_and_then_the_clip_alone(page):
    assert page.run("return loads") == []
    begin(page)
    loads = page.run("return loads")
    assert len(loads) == len(set(loads)) == 3
    assert all("bell" in name for name in loads)
    assert "bell-original" in loads[0]
    page.press("Right", "Left")
    play_on(page, 0.1)
    assert page.run("return loads") == loads
    assert page.run("return document.querySelector('img:not([loading=lazy])')") is None


def test_what_was_heard_longest_ago_makes_room_and_comes_again(page):
    page.run("Shelf.MOST_SECONDS = given[0]", 2.5 * SECONDS)
    begin(page)
    page.press(" ", " ")
    until(page, "loads.filter((name) => name.includes('bell-original')).length === 2")
    until(page, "document.querySelector('.current.playing:not(.loading)')")


def test_the_playhead_is_where_the_sound_is_in_every_picture_of_the_clip(page):
    begin(page)
    frames = page.run("""
      const frames = [];
      for (let i = 0; i < 30; i++) {
        await new Promise(requestAnimationFrame);
        const at = [...document.querySelectorAll(".here .track")].map((track) => {
          const head = track.querySelector(".playhead").getBoundingClientRect();
          return (head.left + 1 - track.getBoundingClientRect().left) / head.width;
        });
        frames.push([tapped.currentTime - (tapped.outputLatency || 0), ...at]);
      }
      return frames;
    """)
    times, *heads = np.array(frames).T
    assert len(heads) == 3
    for head in heads:
        assert np.diff(head).min() >= 0
        assert len(set(head)) > 8  # where the machine is busy, the clock of the sound stands still for some frames
        behind = head * SECONDS - times
        assert np.median(np.abs(behind - np.median(behind))) < 0.02
    hidden = page.run("return getComputedStyle(document.querySelector('[data-clip=wind] .playhead')).visibility")
    assert hidden == "hidden"


def test_the_keys_go_through_systems_clips_and_decodes(page):
    def chosen() -> list[str]:
        return page.run(
            "const player = document.querySelector('.current');"
            "return [player.closest('[data-clip]').dataset.clip, player.dataset.title,"
            " document.querySelector('.bar .what :last-child').textContent]"
        )

    begin(page)
    page.press(" ")
    seen = []
    for key in ("Right", "Right", "Right", "2", "Down", "3", "Left", "Up", "Up"):
        page.press(key)
        seen.append(chosen())
    assert seen == [
        ["bell", "Continuous z", "Continuous z"],
        ["bell", "Codes", "Codes, decode 1"],
        ["bell", "Codes", "Codes, decode 1"],
        ["bell", "Codes", "Codes, decode 2"],
        ["wind", "Codes", "Codes, decode 1"],
        ["wind", "Codes", "Codes, decode 3"],
        ["wind", "Continuous z", "Continuous z"],
        ["bell", "Continuous z", "Continuous z"],
        ["bell", "Continuous z", "Continuous z"],
    ]
    page.press("Shift", "Right")
    until(page, "document.querySelector('.current.playing input').value > 0.1")
    page.press("Escape")
    assert page.run(
        "return [!document.querySelector('.current, .playing, .here'), document.querySelector('.bar').hidden]"
    )


def test_before_a_player_is_chosen_the_arrows_scroll_the_page(page):
    page.run("document.querySelector('#continuous').scrollIntoView()")
    page.press("Down", "Right", "2")
    assert page.run("return document.querySelector('.current')") is None
    page.press(" ")
    until(page, "document.querySelector('.current.playing')")


def test_in_the_variability_table_digits_are_columns_and_rows_are_rates(page):
    begin(page, "#variability td:nth-of-type(2) .player")
    page.press("3")
    until(page, "document.querySelector('.current').dataset.title === 'Codes, decode 3'")
    page.press("Down")
    until(page, "document.querySelector('.current').dataset.column === '3'")
    assert page.run("return document.querySelector('.here').dataset.caption") == "A wind"


@pytest.mark.parametrize("width", [390, 1440])
def test_nothing_is_wider_than_a_phone_or_a_desk(page, width):
    page.resize(width)
    page.click("#continuous .play")
    wide, room = page.run(
        "const { scrollWidth, clientWidth } = document.documentElement; return [scrollWidth, clientWidth]"
    )
    assert width - 20 < wide <= room
    page.command("Emulation.clearDeviceMetricsOverride")


def test_sound_that_cannot_be_played_is_shown_as_such(browser, folder):
    browser.open(folder / "index.html")
    (sound,) = (folder / "audio").glob("*bell-z.js")
    content = sound.read_text()
    sound.write_text(f'spressoSound("{sound.stem}", "bm8gc291bmQ=")')
    browser.click(f"#continuous {Z} .play")
    until(browser, "document.querySelector('.current.broken:not(.playing):not(.loading)')")
    sound.write_text(content)
    browser.click(f"#continuous {Z} .play")
    until(browser, "document.querySelector('.current.playing:not(.broken)')")
    browser.errors()
