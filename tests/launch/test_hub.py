"""`spresso push`, and codecs by their names on the hub, against a hub on this machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import soundfile
import torch
import yaml

from models.codec import SPresso
from models.export import FILES
from tests import fake_hub
from tests.fake_hub import TOKEN, Hub
from tests.launch.codecs import content, export_codec, sound, spresso
from trainer.recipes.reading import load_recipe

NAME = "alice/door-codec"
ROOT = Path(__file__).parents[2]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty hub that this process uses, with an empty cache and an empty folder to work in."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with fake_hub.serving() as hub:
        fake_hub.use(hub, str(tmp_path / "cache"), monkeypatch)
        yield hub


@pytest.fixture
def pushed(hub: Hub, codec: Path) -> Hub:
    assert spresso("push", codec, NAME) == 0
    hub.asked.clear()
    return hub


def files_on(hub: Hub, branch: str = "main", name: str = NAME) -> dict[str, bytes]:
    return hub.models[name].branches[branch]


def another_codec(folder: Path) -> Path:
    (folder / "other").mkdir()
    return export_codec(folder / "other", seed=2)


def front_matter(card: bytes) -> dict[str, object]:
    return yaml.safe_load(card.decode().split("---\n")[1])


def test_what_is_pushed_is_the_export_and_nothing_else(hub, codec, tmp_path, capsys):
    export = shutil.copytree(codec, tmp_path / "export")
    (export / "notes.txt").write_text("my own")
    (export / "evil.pt").write_bytes(b"pickle")
    (export / "distilled").mkdir()
    (export / "distilled" / "mine.wav").write_bytes(b"")
    assert spresso("push", export, NAME) == 0
    assert f"{NAME}: {hub.address}/{NAME}/commit/" in capsys.readouterr().out
    assert files_on(hub).keys() == content(codec).keys() <= set(FILES)
    same = files_on(hub).keys() - {"README.md", "codec.json"}
    assert {name: files_on(hub)[name] for name in same} == {name: content(codec)[name] for name in same}
    assert sum(asked.startswith(f"POST /api/models/{NAME}/commit/") for asked in hub.asked) == 1


def test_the_card_tells_rates_and_use(pushed, codec):
    card = files_on(pushed)["README.md"]
    made = SPresso.from_pretrained(codec)
    facts = front_matter(card)
    assert facts["library_name"] == "spresso"
    assert facts["sample_rate"] == 48_000
    assert facts["bit_rates_kbps"] == [pytest.approx(made.kbps(made.fitted_quantizer().books), abs=1e-3)]
    assert facts["model_hash"] == made.model_hash
    assert "license" not in facts
    assert f"--codec {NAME}" in card.decode()


def test_settings_at_the_head_of_an_edited_card_win(hub, codec, tmp_path):
    export = shutil.copytree(codec, tmp_path / "export")
    (export / "README.md").write_text("---\nlicense: mit\ntags: [mine]\n---\n# Doors\n")
    assert spresso("push", export, NAME) == 0
    card = files_on(hub)["README.md"]
    assert front_matter(card)["license"] == "mit"
    assert front_matter(card)["tags"] == ["mine"]
    assert "# Doors" in card.decode()


def test_a_codec_on_the_hub_encodes_and_decodes_as_its_export(pushed, codec, tmp_path):
    soundfile.write("in.wav", sound(1.0), 48_000)
    assert spresso("encode", "in.wav", "there.spr", "--codec", NAME) == 0
    assert spresso("encode", "in.wav", "here.spr", "--codec", codec) == 0
    assert Path("there.spr").read_bytes() == Path("here.spr").read_bytes()
    assert spresso("decode", "here.spr", "back.wav", "--codec", f"{NAME}@main") == 0
    assert soundfile.info("back.wav").frames == 48_000
    assert spresso("info", "here.spr", "--codec", NAME) == 0


def test_only_the_files_of_an_export_are_downloaded(pushed, tmp_path):
    files_on(pushed).update({"evil.bin": b"pickle", "modeling.py": b"raise SystemExit", "distilled/x.pkl": b""})
    SPresso.from_pretrained(NAME)
    cached = {path.name for path in (tmp_path / "cache").rglob("*")}
    assert not cached & {"evil.bin", "modeling.py", "x.pkl"}
    assert "codec.json" in cached


def test_without_a_network_the_cache_serves(pushed, monkeypatch, capsys):
    first = SPresso.from_pretrained(NAME).state_dict()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    pushed.asked.clear()
    offline = SPresso.from_pretrained(NAME).state_dict()
    assert all(torch.equal(value, offline[key]) for key, value in first.items())
    assert pushed.asked == []
    with pytest.raises(ValueError, match=r"alice/other is not in the hub's cache.*can't be reached: connect"):
        SPresso.from_pretrained("alice/other")


def test_a_hub_that_is_down_is_no_matter_for_what_is_cached(pushed, monkeypatch):
    SPresso.from_pretrained(NAME)
    pushed.faults["GET /api/models"] = [500] * 20
    assert SPresso.from_pretrained(NAME).model_hash
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    assert SPresso.from_pretrained(NAME).model_hash
    with pytest.raises(ValueError, match="alice/other is not in the hub's cache on this machine, and the hub can't be"):
        SPresso.from_pretrained("alice/other")


def test_a_folder_here_wins_over_a_name_on_the_hub(pushed, tmp_path):
    other = another_codec(tmp_path)
    shutil.copytree(other, NAME)
    here = SPresso.from_pretrained(NAME).model_hash
    assert here == SPresso.from_pretrained(other).model_hash
    assert pushed.asked == []


def test_a_slip_in_the_path_of_a_run_asks_no_hub(hub, capsys):
    Path("runs").mkdir()
    assert spresso("info", __file__, "--codec", "runs/tpyo") == 2
    assert "--codec runs/tpyo is missing: give an export folder" in capsys.readouterr().err
    assert hub.asked == []


def test_a_recipe_compares_with_a_codec_on_the_hub(pushed, codec):
    config = load_recipe("tiny", [f"evaluate.codecs={{there: {NAME}, here: {codec}}}"])
    assert config.evaluate.codecs["there"] == NAME
    Path("alice").mkdir()
    with pytest.raises(ValueError, match=rf"evaluate\.codecs: there={NAME} is not an export"):
        load_recipe("tiny", [f"evaluate.codecs={{there: {NAME}}}"])


def test_a_revision_is_a_codec_of_its_own(pushed, tmp_path):
    other = another_codec(tmp_path)
    assert spresso("push", other, NAME, "--revision", "louder") == 0
    main, louder = SPresso.from_pretrained(NAME), SPresso.from_pretrained(f"{NAME}@louder")
    assert main.model_hash != louder.model_hash == SPresso.from_pretrained(other).model_hash
    assert spresso("push", other, NAME, "--revision", "louder") == 0  # the branch is there, and nothing changes
    with pytest.raises(ValueError, match=f"{NAME}@nothing: the hub has no such revision: give a branch"):
        SPresso.from_pretrained(f"{NAME}@nothing")


def test_parts_of_an_earlier_export_do_not_stay(pushed, codec, tmp_path):
    assert "prior.safetensors" in files_on(pushed)
    files_on(pushed)["LICENSE"] = b"written on the hub"
    made = SPresso.from_pretrained(codec)
    made.prior = None
    base = codec / "dit.safetensors"
    made.save_pretrained(tmp_path / "plain", base=base, card="# A codec\n")
    assert spresso("push", tmp_path / "plain", NAME) == 0
    assert "prior.safetensors" not in files_on(pushed)
    assert files_on(pushed)["LICENSE"] == b"written on the hub"
    assert SPresso.from_pretrained(NAME).prior is None


def test_a_dry_run_asks_nobody(hub, codec, capsys):
    assert spresso("push", codec, NAME, "--dry-run", "--license", "cc0-1.0") == 0
    out = capsys.readouterr().out
    assert re.search(r"quantizer\.safetensors +\d", out)
    assert "license: cc0-1.0" in out
    assert hub.asked == []


def test_private_is_private(hub, codec, capsys):
    assert spresso("push", codec, NAME, "--private") == 0
    assert hub.models[NAME].private
    assert SPresso.from_pretrained(NAME).model_hash
    hub.models[NAME].private = False
    assert spresso("push", codec, NAME, "--private") == 2
    assert f"{NAME} is public already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("pattern", "status", "words"),
    [
        ("POST /api/repos/create", 401, "log in with  hf auth login"),
        ("POST /api/repos/create", 403, "does not allow this"),
        (r"POST .*/preupload/", 403, "does not allow this"),
        (r"POST .*/commit/", 500, "the hub answered 500 (a fault of the test)"),
        (r"PUT /lfs/", 403, "does not allow this"),
    ],
)
def test_a_refusal_of_the_hub_is_one_line_with_its_mend(hub, codec, capsys, pattern, status, words):
    hub.faults[pattern] = [status] * 30
    assert spresso("push", codec, NAME) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(f"spresso: {NAME}")]
    assert len(lines) == 1
    assert words in lines[0]
    assert TOKEN not in lines[0]
    assert NAME not in hub.models or "codec.json" not in files_on(hub)  # no part of an export is there


def test_a_wrong_token_is_told(hub, codec, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    assert spresso("push", codec, NAME) == 2
    err = capsys.readouterr().err
    assert "log in with  hf auth login" in err
    assert "hf_another" not in err


@pytest.mark.parametrize(
    "name", ["door-codec", "alice/door codec", "alice/a/b", "alice/..", "https://huggingface.co/a/b"]
)
def test_a_name_that_is_none_is_refused(hub, codec, capsys, name):
    assert spresso("push", codec, name) == 2
    assert "is not a name" in capsys.readouterr().err
    assert hub.asked == []


def test_an_upload_is_tried_again_after_a_fault(hub, codec):
    hub.faults |= {r"PUT /lfs/": [503], "preupload": [500]}
    assert spresso("push", codec, NAME) == 0
    assert SPresso.from_pretrained(NAME).model_hash


def test_a_download_that_is_cut_off_goes_on(pushed, codec):
    pushed.faults["GET .*/resolve/.*quantizer"] = [0]
    assert SPresso.from_pretrained(NAME).model_hash == SPresso.from_pretrained(codec).model_hash
    assert pushed.faults["GET .*/resolve/.*quantizer"] == []


def test_what_another_content_than_published_came_of_is_refused_and_named(pushed, capsys):
    right = files_on(pushed)["quantizer.safetensors"]
    pushed.wrong["quantizer.safetensors"] = right[:-4] + b"\x01\x02\x03\x04"
    with pytest.raises(ValueError, match="is damaged, or holds files of another export"):
        SPresso.from_pretrained(NAME)
    assert spresso("weights", NAME) == 1
    found = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  quantizer.safetensors")]
    assert "no" in found[0].split()
    assert "it is not the file that the hub published" in found[0]


def test_the_weights_of_a_whole_codec_in_the_cache_are_whole(pushed, capsys):
    SPresso.from_pretrained(NAME)
    assert spresso("weights", NAME) == 0
    assert re.search(r"hashes +ok +\d+ files are as the hub published them", capsys.readouterr().out)


def test_a_damaged_export_is_not_pushed(hub, codec, tmp_path, capsys):
    export = shutil.copytree(codec, tmp_path / "export")
    weights = bytearray((export / "upsampler.safetensors").read_bytes())
    weights[-1] ^= 1
    (export / "upsampler.safetensors").write_bytes(weights)
    assert spresso("push", export, NAME) == 2
    assert "is damaged, or holds files of another export" in capsys.readouterr().err
    assert hub.asked == []


def test_no_folder_of_this_machine_is_published(hub, tmp_path, capsys):
    export_codec(tmp_path)
    made = SPresso.from_pretrained(tmp_path / "export")
    base = tmp_path / "secret-project" / "my-dit"
    base.mkdir(parents=True)
    shutil.copy(tmp_path / "dit.safetensors", base)
    made.save_pretrained(tmp_path / "on-a-base", base=base, card="# A codec\n")
    assert "secret-project" in (tmp_path / "on-a-base" / "codec.json").read_text()
    assert spresso("push", tmp_path / "on-a-base", NAME) == 0
    assert "the licence of the base is not known" in capsys.readouterr().err
    assert not any(b"secret-project" in file for file in files_on(hub).values())
    assert "whose licence is not known" in files_on(hub)["README.md"].decode()
    with pytest.raises(
        ValueError, match=r"stands on weights that are not here \(or give them as base=\): my-dit is missing"
    ):
        SPresso.from_pretrained(NAME)
    assert SPresso.from_pretrained(NAME, base=base).model_hash == made.model_hash


def test_no_token_is_written(codec, tmp_path):
    """Push and decode in processes of their own, with all that huggingface_hub reads from the environment."""
    work = tmp_path / "work"
    work.mkdir()
    soundfile.write(work / "in.wav", sound(0.5), 48_000)
    shutil.copytree(codec, work / "runs/mine/finetune/export")
    assert spresso("encode", work / "in.wav", work / "out.spr", "--codec", codec) == 0
    with fake_hub.serving() as hub:
        settings = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        env = os.environ | settings | {"HF_TOKEN": TOKEN, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        for words in (["push", "mine", NAME], ["decode", "out.spr", "back.wav", "--codec", NAME]):
            command = [sys.executable, "-m", "launch.cli", *words]
            done = subprocess.run(command, cwd=work, env=env, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            assert TOKEN not in done.stdout + done.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert work / "back.wav" in files
    assert [path for path in files if TOKEN.encode() in path.read_bytes()] == []
    assert json.loads(files_on(hub)["codec.json"])["format"] == 1
