"""A run, its page and its sets replace what a run wrote, and nothing that a user has put in their place."""

from __future__ import annotations

from pathlib import Path

import pytest
import soundfile

from launch import pipeline
from launch.cli import main
from tests.launch.codecs import export_codec, sound
from trainer.data.synth.dataset import write_sounds
from trainer.evaluate.listening_test import write_listening_test
from trainer.evaluate.pieces import Pieces
from trainer.evaluate.report_file import require_own_report
from trainer.page import clear_page
from trainer.recipes.reading import load_recipe
from trainer.recipes.values import to_yaml
from trainer.run_directory import RunDirectory, require_own_config, write_config

RATE = 48_000


def refused(capsys, *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_a_recipe_named_config_yaml_is_not_replaced_by_the_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for text in ("name: mine\n", "# my recipe\n" + to_yaml(load_recipe("tiny", []))):
        Path("config.yaml").write_text(text)
        assert "config.yaml was not written by a run" in refused(capsys, "run", "config.yaml", "run_dir=.")
        assert Path("config.yaml").read_text() == text
        assert "config.yaml was not written by a run" in refused(
            capsys, "sbatch", "config.yaml", "run_dir=.", "cluster=slurm"
        )
        assert Path("config.yaml").read_text() == text
    assert [path.name for path in Path().iterdir()] == ["config.yaml"]


def test_a_runs_own_config_is_replaced(tmp_path):
    write_config(tmp_path, load_recipe("tiny", ["seed=1"]))
    write_config(tmp_path, load_recipe("demo", ["seed=2"]))
    assert (tmp_path / "config.yaml").read_text() == to_yaml(load_recipe("demo", ["seed=2"]))
    for path in (Path(__file__).parents[1] / "golden" / "old_run").rglob("config.yaml"):
        require_own_config(path.parent)


@pytest.mark.parametrize("name", ["config.yaml", "command.txt", "environment.txt", "export/weights.pt"])
def test_a_stage_takes_no_folder_of_somebody_else(tmp_path, name):
    config = load_recipe("tiny", [f"run_dir={tmp_path}"])
    directory = RunDirectory(tmp_path / "pretrain", "pretrain")
    (tmp_path / "pretrain" / name).parent.mkdir(parents=True)
    (tmp_path / "pretrain" / name).write_text("mine")
    with pytest.raises(ValueError, match=Path(name).parts[0]):
        directory.claim(config, {})
    assert (tmp_path / "pretrain" / name).read_text() == "mine"
    (tmp_path / "pretrain" / name).unlink()
    if name.startswith("export"):
        (tmp_path / "pretrain" / "export").rmdir()
    directory.claim(config, {})
    directory.claim(config, {})


def test_an_export_keeps_what_was_put_beside_it_and_takes_no_other_folder(tmp_path, monkeypatch):
    folder = export_codec(tmp_path)
    (folder / "notes.txt").write_text("mine")
    (folder / "quantizer.safetensors").write_text("old")
    (tmp_path / "dit.safetensors").unlink()
    export_codec(tmp_path)
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "quantizer.safetensors").read_bytes()[:3] != b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dit.safetensors", "export"]
    (folder / "codec.json").unlink()
    (tmp_path / "dit.safetensors").unlink()
    with pytest.raises(ValueError, match="export was not written as an export, which would replace it"):
        export_codec(tmp_path)
    assert (folder / "notes.txt").read_text() == "mine"


def test_an_export_keeps_weights_of_somebody_else_and_a_model_card_that_was_edited(tmp_path):
    folder = export_codec(tmp_path)
    (folder / "merged_for_comfy.safetensors").write_text("mine")
    written = {path.name for path in folder.iterdir()}

    def export_again(seed: int) -> set[str]:
        (tmp_path / "dit.safetensors").unlink()
        export_codec(tmp_path, seed)
        return {path.name for path in folder.iterdir()}

    card = (folder / "README.md").read_text()
    assert export_again(seed=2) == written
    assert (folder / "merged_for_comfy.safetensors").read_text() == "mine"
    assert (folder / "README.md").read_text() != card  # the new model's
    (folder / "README.md").write_text("# My codec\n")
    [older] = export_again(seed=3) - written
    assert (folder / older).read_text() == "# My codec\n"
    assert older.startswith("README.md.")
    assert export_again(seed=4) == {*written, older}


def test_a_page_takes_no_folder_of_somebody_else(tmp_path):
    for name in ("index.html", "audio/song.js", "audio/001-01-1-a.wav", "images/me.png", "audio/001-01-1-x-y.js/in"):
        page = tmp_path / name.replace("/", "_")
        (page / name).parent.mkdir(parents=True)
        (page / name).write_text("mine")
        if "x-y" in name:
            continue
        with pytest.raises(ValueError, match="was not written by `spresso page`"):
            clear_page(page)
        assert (page / name).read_text() == "mine"
    page = tmp_path / "own"
    (page / "audio").mkdir(parents=True)
    (page / "audio" / "001-02-1-bell-z.js").write_text("")
    (page / "index.html").write_text('<a href="https://arxiv.org/abs/2602.15082">')
    (page / "notes.txt").write_text("mine")
    clear_page(page)
    assert sorted(path.name for path in page.iterdir()) == ["index.html", "notes.txt"]


def test_an_evaluation_keeps_what_it_did_not_write(tmp_path):
    for kind, name in (("pieces", "zq-0123abcd"), ("audio", "zq-0123abcd"), ("audio", "my songs"), ("pieces", "mine")):
        (tmp_path / kind / name).mkdir(parents=True)
    Pieces(tmp_path).keep(set())
    assert sorted(path.name for path in tmp_path.glob("*/*")) == ["mine", "my songs"]
    (tmp_path / "table.md").write_text("mine")
    with pytest.raises(ValueError, match=r"table\.md was not written by `spresso evaluate`"):
        require_own_report(tmp_path)
    (tmp_path / "evaluation.json").write_text('{"mine": 1}')
    with pytest.raises(ValueError, match=r"evaluation\.json was not written by `spresso evaluate`"):
        require_own_report(tmp_path)
    require_own_report(Path(__file__).parents[1] / "golden" / "old_run" / "evaluate")


@pytest.fixture
def report(tmp_path) -> dict:
    """An evaluation's report of two systems and a clip."""
    systems = ("original", "zq")
    for key in systems:
        soundfile.write(tmp_path / f"{key}.flac", sound(0.1)[:, 0], RATE)
    return {
        "recipe": "demo",
        "sample_rate": RATE,
        "systems": [{"key": key, "role": "original" if key == "original" else "system"} for key in systems],
        "clips": [{"key": "bell", "audio": {key: [f"{key}.flac"] for key in systems}}],
    }


def test_a_listening_test_takes_no_folder_of_somebody_else(report, tmp_path):
    mine = tmp_path / "web" / "configs" / "default.yaml"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(ValueError, match="holds files that are not of a listening test"):
        write_listening_test(report, tmp_path, tmp_path / "web")
    (tmp_path / "test.key.json").write_text('{"mine": 1}')
    with pytest.raises(ValueError, match="is not the key of a listening test"):
        write_listening_test(report, tmp_path, tmp_path / "test")
    assert mine.read_text() == "mine"
    assert not (tmp_path / "test").exists()
    made = write_listening_test(report, tmp_path, tmp_path / "own")
    (tmp_path / "own" / "configs" / "answers.csv").write_text("mine")
    with pytest.raises(ValueError, match="holds files that are not of a listening test"):
        write_listening_test(report, tmp_path, tmp_path / "own")
    assert made.config.exists()


def test_the_key_of_another_listening_test_is_kept(report, tmp_path):
    keys = [write_listening_test(report, tmp_path, tmp_path / "t", seed=seed).key.read_text() for seed in (0, 1, 1, 2)]
    assert keys[1] == keys[2]
    assert (tmp_path / "t.key.json").read_text() == keys[3]
    assert (tmp_path / "t.key.1.json").read_text() == keys[0]
    assert (tmp_path / "t.key.2.json").read_text() == keys[1]
    assert not (tmp_path / "t.key.3.json").exists()
    assert not list(tmp_path.glob(".*"))


def test_edited_captions_are_kept(tmp_path, caplog):
    write_sounds(tmp_path / "set", hours=0.001, seed=5)
    captions = tmp_path / "set" / "captions.jsonl"
    written = captions.read_text()
    write_sounds(tmp_path / "set", hours=0.001, seed=5)
    assert not caplog.records
    captions.write_text(written.replace(" ", "  "))
    write_sounds(tmp_path / "set", hours=0.001, seed=5)
    assert captions.read_text() == written.replace(" ", "  ")
    assert "captions.jsonl differs" in caplog.text


def test_prepare_removes_no_folder_with_other_files(prepared, tmp_path):
    config = load_recipe("tiny", [f"run_dir={tmp_path}", f"data.audio={prepared / 'audio'}", "data.workers=1"])
    latents = tmp_path / "latents"
    for name in (".prepare/settings.json", "train/00000-00000.tar", "train/my own.tar"):
        (latents / name).parent.mkdir(parents=True, exist_ok=True)
        (latents / name).write_text("{}")
    with pytest.raises(ValueError, match=r"my own\.tar was not written by `spresso prepare`"):
        pipeline.prepare_latents(config)
    assert (latents / "train" / "my own.tar").exists()


def test_an_index_and_sounds_of_somebody_else_are_kept(prepared, tmp_path, capsys):
    for name, text in (("set.json", '{"mine": 1}'), ("set.json", "mine"), ("index.npy", "mine")):
        folder = tmp_path / f"tars{len(text)}"
        folder.mkdir()
        for tar in (prepared / "latents" / "test").glob("*.tar"):
            (folder / tar.name).write_bytes(tar.read_bytes())
        (folder / name).write_text(text)
        assert f"{name} is no index of latents" in refused(capsys, "index", folder, "--autoencoder", "spectral")
        assert (folder / name).read_text() == text
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    shards = prepared / "latents" / "test"
    assert main(["data", str(shards), "--play-to", str(tmp_path / "played"), "--samples", "2"]) == 0
    assert main(["data", str(shards), "--play-to", str(tmp_path / "played"), "--samples", "2"]) == 0
    first, second = sorted((tmp_path / "played").iterdir())
    soundfile.write(second, sound(0.1), RATE)
    first.unlink()
    told = refused(capsys, "data", shards, "--play-to", tmp_path / "played", "--samples", 2)
    assert f"{second} was not written by `spresso data --play-to`" in told
    assert not first.exists()
