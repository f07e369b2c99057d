"""Tables of a report: what stands where, and text that stays text."""

from __future__ import annotations

import dataclasses
import re

import pytest

from trainer.evaluate import tables
from trainer.evaluate.pieces import Piece
from trainer.evaluate.report import Gathered
from trainer.evaluate.systems import System

HOSTILE = r"50% & $x_1$ #2 {a} ~^\ <b> | pipe × ±"


@pytest.fixture
def report() -> dict:
    def system(key: str, role: str, **more) -> dict:
        return {"key": key, "title": key, "role": role, "payload_kbps": None, "table": "", "unavailable": "",
                "licence": "", **more}  # fmt: skip

    def score(mean: float, half: float = 0.5, **more) -> dict:
        return {"mean": mean, "std": 1.0, "ci": [mean - half, mean + half], **more}

    systems = [
        system("original", "original"),
        system("ae", "ceiling"),
        system("z", "system", table="continuous"),
        system("zq9", "system", table="low", payload_kbps=1.3333),
        system("zq1", "system", table="ultra_low", payload_kbps=0.096),
        system("dac", "baseline", table="low", payload_kbps=1.74, licence="MIT"),
        system("gone", "baseline", table="low", unavailable="no weights", licence="NC"),
        system("other", "floor"),
    ]
    results = {
        "ae": {"log_mel": score(1.4)},
        "z": {"log_mel": score(8.0, control=21.0), "spread": score(3.0)},
        "zq9": {"log_mel": score(9.0, control=22.0, best=True), "kernel": score(-0.0125, 0.001)},
        "zq1": {"log_mel": score(12.0, control=23.0), "kernel": score(0.2)},
        "dac": {"log_mel": score(9.1, significant=False), "kernel": score(0.1, significant=True)},
        "other": {"log_mel": score(21.0)},
    }
    figures = [
        {"key": "log_mel", "title": "Log-mel distance", "unit": "dB", "better": "lower", "digits": 2},
        {"key": "kernel", "title": "Kernel distance (mel-stat)", "unit": "", "better": "lower", "digits": None},
    ]
    spread = {"key": "spread", "title": "Spread of decodes", "unit": "dB", "better": "", "digits": 2}
    speed = {"encode_realtime_factor": 30.1, "decode_realtime_factor": 4.2, "steps": 16, "device": "cpu"}
    return {"recipe": "demo", "subtitle": "2 clips", "systems": systems, "results": results, "figures": figures,
            "variability": {"systems": ["z"], "figure": spread, "decodes": 5}, "embedding": "mel-stat",
            "speed": speed}  # fmt: skip


def line_of(text: str, title: str) -> str:
    return next(line for line in text.splitlines() if re.match(rf"(\| )?{re.escape(title)}\b", line))


def test_sections_set_ceilings_floors_and_codecs_by_others_apart(report):
    found = {title: [row.title for row in rows] for title, rows in tables.sections(report)}
    assert found == {
        "Ceiling": ["ae"],
        "Continuous": ["z"],
        "Low rates": ["zq9"],
        "Low rates: codecs by others": ["dac", "gone"],
        "Ultra-low rates": ["zq1"],
        "Floors": ["other"],
    }


def test_text(report):
    text = tables.table(report)
    assert line_of(text, "zq9").split() == ["zq9", "1.333", "9.00*", "±0.50", "[22.00]", "-0.013", "±0.001"]
    assert line_of(text, "dac").split() == ["dac", "1.740", "9.10*", "±0.50", "0.100", "±0.500"]
    assert line_of(text, "z").split() == ["z", "8.00", "±0.50", "[21.00]", "3.00", "±0.50"]
    assert "gone: not available, no weights" in text
    assert "encode 30.1×, decode 4.2×" in text
    assert "mel-stat" in text


def test_markdown(report):
    text = tables.markdown(report)
    assert line_of(text, "zq9") == "| zq9 | 1.333 | **9.00** ± 0.50 [22.00] | -0.013 ± 0.001 | – |"
    assert line_of(text, "gone") == "| gone (not available) | – | – | – | – |"
    assert "* gone: not available: no weights; licence NC" in text
    widths = [line.count("|") - line.count("\\|") for line in text.splitlines() if line.startswith("|")]
    assert set(widths) == {6}


def test_latex(report):
    text = tables.latex(report)
    assert r"zq9 & 1.333 & $\mathbf{9.00} \pm 0.50\;[22.00]$ & $-0.013 \pm 0.001$ & -- \\" in text
    assert r"gone & -- & \multicolumn{3}{l}{not available} \\" in text
    assert r"System & kbps & Log-mel $\downarrow$ & KD (mel-stat) $\downarrow$ & Spread \\" in text
    assert text.count("{") == text.count("}")
    for name in ("table*", "tabular"):
        assert text.count(rf"\begin{{{name}}}") == text.count(rf"\end{{{name}}}") == 1


def test_text_of_users_stays_text(report):
    for system in report["systems"]:
        system["title"] = f"{system['key']} {HOSTILE}"
    report["recipe"] = report["subtitle"] = HOSTILE
    text = tables.latex(report)
    body = text[text.index(r"\toprule") : text.index(r"\bottomrule")]
    for line in body.splitlines():
        if line.startswith("zq9"):
            escaped = r"zq9 50\% \& \$x\_1\$ \#2 \{a\} \textasciitilde{}\textasciicircum{}\textbackslash{}"
            assert line.startswith(escaped + r" $<$b$>$ $|$ pipe $\times$ $\pm$ & ")
    unescaped = re.sub(r"\\[&%$#_{}]", "", text)
    assert "#" not in unescaped
    assert unescaped.count("$") % 2 == 0
    rows = [line for line in body.splitlines() if line.endswith(r"\\") and "multicolumn" not in line]
    assert {re.sub(r"\\&", "", line).count("&") for line in rows} == {4}
    marked = tables.markdown(report)
    assert "<b>" not in marked
    assert {line.count("|") - line.count("\\|") for line in marked.splitlines() if line.startswith("|")} == {6}


def test_without_decodes_or_rivals_there_is_a_table(report):
    report["variability"]["systems"] = []
    report["results"] = {"ae": report["results"]["ae"]}
    for system in report["systems"]:
        system["unavailable"] = "" if system["key"] in ("original", "ae") else "no"
    assert "spread" not in tables.table(report)
    assert tables.latex(report).count(r"\multicolumn{2}{l}{not available}") == 6


def test_bit_rates_are_those_of_all_clips_and_the_entropy_coded_one_stands_beside(report):
    system = dataclasses.asdict(System("zq", "zq", "system", table="ultra_low"))
    halves = [
        Piece(system, [0], payload_bits=[200], file_bytes=[40], coded_bits=[100]),
        Piece(system, [1], payload_bits=[200], file_bytes=[44], coded_bits=[140]),
    ]
    found = Gathered(halves, seconds=2.0, control_of="").system
    rates = (found.payload_kbps, found.file_kbps, found.coded_kbps)
    assert rates == pytest.approx((0.1, 8 * 84 / 4 / 1000, 0.06))
    report["systems"].append(dataclasses.asdict(found))
    report["results"]["zq"] = report["results"]["zq1"]
    assert "0.100 (0.060 entropy-coded)" in line_of(tables.markdown(report), "zq")
    assert "entropy-coded" not in line_of(tables.markdown(report), "zq1")


def test_retrieval_is_told_beside_what_guessing_would_reach(report):
    report["figures"].append(
        {"key": "retrieval", "title": "Retrieval (mel-stat)", "unit": "%", "better": "higher", "digits": 1}
        | {"chance": 100 / 48}
    )
    report["results"]["zq9"]["retrieval"] = {"mean": 87.5, "std": 33.1, "ci": [79.1, 95.9], "control": 0.0}
    text = tables.table(report)
    assert line_of(text, "zq9").split()[-3:] == ["87.5", "±8.4", "[0.0]"]
    assert "; embedding: mel-stat; retrieval by chance 2.1 %; *" in text
    assert "| Retrieval (mel-stat) (%, chance 2.1, ↑) |" in tables.markdown(report)
    assert r"Retrieval (mel-stat) $\uparrow$ &" in tables.latex(report)
    assert r" & \%, chance 2.1 & " in tables.latex(report)
    assert "chance" not in tables.table(report | {"figures": report["figures"][:2]})


INVISIBLE = "\x1b[2J\x1b]0;x\x07\x9b1m\u202egpj.\u2066 end"
VISIBLE = r"\x1b[2J\x1b]0;x\x07\x9b1m\u202egpj.\u2066 end"


def test_a_terminal_obeys_no_title(report):
    report["systems"][3]["title"] = f"zq9 {INVISIBLE}"
    report["systems"][6]["unavailable"] = report["speed"]["device"] = report["embedding"] = INVISIBLE
    text = tables.table(report)
    assert text.count(VISIBLE) == 4
    assert all(line.isprintable() for line in text.split("\n"))


def test_braces_of_a_figure_or_a_caption_are_no_fields(report):
    report["figures"][1]["key"] = "kernel_of_ours"
    report["figures"][1]["title"] = report["recipe"] = "{a} {0.__class__} {embedding}"
    report["embedding"] = "{mel}"
    text = tables.latex(report)
    assert r"& \{a\} \{0.\_\_class\_\_\} \{embedding\} $\downarrow$ &" in text
    assert r"\caption{\{a\} \{0.\_\_class\_\_\} \{embedding\}: " in text


def test_latex_prints_every_special_character(report):
    report["recipe"] = "\\ { } $ & # % _ ^ ~ ` \x1b \u202e \\input{x}"
    caption = next(line for line in tables.latex(report).splitlines() if line.startswith(r"\caption"))
    letters = r"\textbackslash{} \{ \} \$ \& \# \% \_ \textasciicircum{} \textasciitilde{} \`{} "
    shown = r"\textbackslash{}x1b \textbackslash{}u202e \textbackslash{}input\{x\}: 2 clips."
    assert caption.startswith(rf"\caption{{{letters}{shown}")


@pytest.mark.parametrize(
    ("title", "escaped"), [("[ours] 2 kbps", "{[}ours{]} 2 kbps"), ("*best", "{*}best"), ("]", "{]}")]
)
def test_no_title_is_an_option_of_the_row_before(report, title, escaped):
    for system in report["systems"]:
        system["title"] = title
    rows = [line for line in tables.latex(report).splitlines() if line.endswith(r"\\") and " & " in line]
    assert sum(line.startswith(f"{escaped} & ") for line in rows) == len(rows) - 2 > 2  # all but two lines of heads


@pytest.mark.parametrize(
    "text",
    [
        *("![](https://a.b/c.png)", "[x](javascript:alert(1))", "[x]: https://a.b", "<img src=x onerror=alert(1)>"),
        *("`a`", "``a``", "a|b", "a\\|b", "*a* _b_ __c__", "~~a~~", "# a", "&lt;b&gt; &amp;", "<https://a.b>", "$a$"),
        *("<script>alert(1)</script>", "a\\", "\\[x](y)", "{a} C# 50 %"),
    ],
)
def test_markdown_shows_text_as_it_is(text, report):
    markdown_it = pytest.importorskip("markdown_it")
    system = report["systems"][3]
    system["title"] = system["licence"] = report["recipe"] = report["subtitle"] = text
    report["figures"][0]["title"] = report["embedding"] = text
    tokens = markdown_it.MarkdownIt("gfm-like", {"linkify": False}).parse(tables.markdown(report))
    inline = [token for token in tokens if token.type == "inline"]
    kinds = {child.type for token in inline for child in token.children}
    assert kinds <= {"text", "text_special", "strong_open", "strong_close"}
    shown = ["".join(child.content for child in token.children) for token in inline]
    assert shown.count(text) == 2  # the heading and the row
    assert shown.count(f"{text}.") == 1
    assert shown.count(f"{text}: licence {text}") == 1
    assert shown.count(f"{text} (dB, ↓)") == 6  # the head of each section
    assert not [token for token in tokens if token.type.startswith(("html", "code", "fence"))]
