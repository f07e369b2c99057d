"""The card of a codec on the hub: licences, what it stands on, figures, the curve of bits, sounds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import soundfile
import yaml

from launch.model_card import bases_of, licences_of
from launch.push import _portable
from models.export import read_description
from tests.launch.codecs import sound, spresso

NAME = "alice/door-codec"


def description(codec: Path, *, kind: str, folder: str | None, base: str | None) -> Any:
    """Return the description of an export, as if it stood on another AudioAE and another D."""
    found: Any = read_description(codec)
    found["config"]["autoencoder"] = {"kind": kind, "folder": folder}
    found["base"]["path"] = base
    return found


@pytest.mark.parametrize(
    ("kind", "folder", "base", "licences", "known"),
    [
        ("magnitude", None, None, [], 0),
        ("magnitude", None, "/data/mine", [], 1),
        ("woosh", "/x/Woosh-AE", None, ["cc-by-nc-4.0"], 1),
        ("woosh", "/x/Woosh-AE", "/x/Woosh-DFlow", ["cc-by-nc-4.0"], 2),
        ("woosh", "/x/ae", "/x/flow", ["cc-by-nc-4.0"], 2),
        ("oobleck", "stabilityai/stable-audio-open-1.0", "stabilityai/stable-audio-open-1.0", ["other"], 2),
        ("same", "/y/stable-audio-3-medium-base", "/y/stable-audio-3-medium-base", ["other"], 2),
    ],
)
def test_the_licence_of_the_base_is_known_by_release_or_by_kind(codec, kind, folder, base, licences, known):
    bases = bases_of(description(codec, kind=kind, folder=folder, base=base))
    assert len(bases) == known
    assert [licence.identifier for licence in licences_of(bases)] == licences
    assert all(("not known" in each.text) == (each.licence is None) for each in bases)


@pytest.mark.parametrize(
    ("folder", "place"),
    [
        ("/home/alice/secret/Woosh-Flow", "checkpoints/Woosh-Flow"),
        ("/home/alice/secret/stable-audio-3-medium", "checkpoints/stable-audio-3-medium"),
        ("stabilityai/stable-audio-open-1.0", "stabilityai/stable-audio-open-1.0"),
        ("/home/alice/secret/mine", "mine"),
        ("../secret/mine", "mine"),
        ("bob/dit", "bob/dit"),
    ],
)
def test_a_base_is_named_by_where_recipes_look_for_it(codec, folder, place):
    told = json.loads(_portable(description(codec, kind="woosh", folder=folder, base=folder)))
    assert told["base"]["path"] == told["config"]["autoencoder"]["folder"] == place
    assert "secret" not in json.dumps(told)


@pytest.fixture
def run(codec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with an export, and an evaluation of that export with one clip."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "mine"
    shutil.copytree(codec, folder / "finetune" / "export")
    model = read_description(codec)["model"]

    def system(key: str, role: str, kbps: float | None = None) -> dict[str, Any]:
        rates = {"payload_kbps": kbps, "file_kbps": kbps, "coded_kbps": None}
        text = {"title": f"System {key}", "detail": "", "note": "", "licence": "", "unavailable": ""}
        return {"key": key, "role": role, "page": True, "table": "low" if kbps else "", **rates, **text}

    result = {"mean": 9.25, "std": 1.0, "ci": [9.0, 9.5]}
    figure = {"key": "log_mel", "title": "Log-mel", "unit": "dB", "better": "lower", "note": "", "digits": 2}
    point = {"mean": 9.25, "ci": [9.0, 9.5], "clips": [9.25], "books": 2, "bits": 8, "kbps": 1.333}
    report = {
        "recipe": "mine", "model_hash": model, "created": "", "sample_rate": 48_000, "subtitle": "1 clip",
        "systems": [system("original", "original"), system("zq2", "system", 1.333), system("dac", "baseline", 1.7)],
        "tables": {}, "figures": [figure], "embedding": "mel-stat", "confidence": 0.95,
        "results": {"zq2": {"log_mel": result}},
        "variability": {"decodes": 1, "systems": [], "figure": figure},
        "clips": [{"key": "door", "caption": "a <b>door</b> | slams", "seconds": 0.1,
                   "audio": {key: [f"audio/{key}.wav"] for key in ("original", "zq2", "dac")}}],
        "speed": {"encode_realtime_factor": 9.0, "decode_realtime_factor": 9.0, "steps": 12, "device": "cpu"},
        "curve": {"z_rank": 3, "channels": 4, "clips": 1, "points": [point], "lines": {}, "identity": ""},
        "identity": "x",
    }  # fmt: skip
    (folder / "evaluate" / "audio").mkdir(parents=True)
    (folder / "evaluate" / "evaluation.json").write_text(json.dumps(report))
    for key in ("original", "zq2", "dac"):
        soundfile.write(folder / "evaluate" / "audio" / f"{key}.wav", sound(0.1), 48_000)
    return folder


def test_the_card_has_the_figures_and_the_curve_of_the_runs_evaluation(run, capsys):
    assert spresso("push", "mine", NAME, "--dry-run") == 0
    out = capsys.readouterr().out
    assert "| System zq2 | 1.333 | 9.25 ± 0.25 |" in out
    assert "What a bit is worth" in out
    assert "| 8 | 1.333 | 9.25 ± 0.25 |" in out
    assert "audio controls" not in out


def test_sounds_are_uploaded_only_where_asked_for_and_only_ours(run, capsys):
    assert spresso("push", run, NAME, "--dry-run", "--sounds", "3") == 0
    listed, card = capsys.readouterr().out.split("\n\n---\n")
    assert [line.split()[0] for line in listed.splitlines() if "sounds/" in line] == [
        "sounds/0.original.wav",
        "sounds/0.zq2.wav",
    ]
    assert '<audio controls src="sounds/0.zq2.wav">' in card
    assert "<b>" not in card


def test_figures_of_another_codec_are_left_out_or_refused(run, tmp_path, capsys):
    path = run / "evaluate" / "evaluation.json"
    report = json.loads(path.read_text()) | {"model_hash": "0" * 64}
    path.write_text(json.dumps(report))
    assert spresso("push", run, NAME, "--dry-run") == 0
    told = capsys.readouterr()
    assert "so the card has no figures: evaluate again" in told.err
    assert "System zq2" not in told.out
    assert spresso("push", run, NAME, "--dry-run", "--evaluation", run / "evaluate") == 2
    assert "give the evaluation of this codec" in capsys.readouterr().err
    assert spresso("push", run, NAME, "--dry-run", "--sounds", "1") == 2
    assert spresso("push", run, NAME, "--dry-run", "--evaluation", tmp_path) == 2
    assert "evaluation.json is missing: give the folder" in capsys.readouterr().err


def test_a_run_without_a_codec_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "new").mkdir(parents=True)
    assert spresso("push", "new", NAME) == 2
    assert "has no export of a codec that can encode: run its stage finetune first" in capsys.readouterr().err


def test_the_head_of_the_card_is_yaml_that_the_hub_knows(run, capsys):
    assert spresso("push", run, NAME, "--dry-run", "--license", "cc-by-4.0") == 0
    facts = yaml.safe_load(capsys.readouterr().out.split("---\n")[1])
    assert facts["license"] == "cc-by-4.0"
    assert facts["pipeline_tag"] == "audio-to-audio"
    assert all(isinstance(rate, float) for rate in facts["bit_rates_kbps"])
