"""`spresso weights`: the list of public weights, and the check of a folder."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from launch import list_weights
from models.backbones import releases
from models.backbones.releases import CC_BY_NC, RELEASES, Release
from models.hub import locate
from tests import stable_audio
from tests.launch.codecs import spresso

ROOT = Path(__file__).parents[2]
PAGE = " ".join((ROOT / "docs/pretrained.md").read_text().split())


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny release of Stable Audio Open."""
    return stable_audio.write_release(tmp_path_factory.mktemp("release"))


@pytest.fixture
def copy(release: Path, tmp_path: Path) -> Path:
    """The release as a snapshot in the hub's cache: links to files that are named by their hashes."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0"
    blobs.mkdir()
    for file in (path for path in release.rglob("*") if path.is_file()):
        content = file.read_bytes()
        large = file.suffix == ".safetensors"
        digest = hashlib.sha256(content) if large else hashlib.sha1(b"blob %d\0" % len(content) + content)
        (blobs / digest.hexdigest()).write_bytes(content)
        link = snapshot / file.relative_to(release)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / digest.hexdigest(), link.parent))
    return snapshot


def test_the_list_needs_nothing_heavy():
    code = (
        "import sys; from launch.cli import main; status = main(['weights']); "
        "sys.exit(status or bool({'torch', 'omegaconf', 'numpy', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(release.name in done.stdout for release in RELEASES)


def test_what_is_here_is_named_and_needs_no_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints" / "Woosh-AE").mkdir(parents=True)
    text = list_weights.listing()
    assert re.search(r"Woosh-AE +AudioAE .*checkpoints/Woosh-AE$", text, re.MULTILINE)
    assert "Woosh-AE.zip" not in text
    assert "spresso weights Woosh-Flow.zip" in text


def test_every_choice_of_model_finds_its_weights_where_the_list_says():
    choices = {path.stem: OmegaConf.load(path) for path in (ROOT / "configs/model").glob("*.yaml")}
    needy = {name for name, config in choices.items() if "pretrained" in config}
    assert needy == {release.model for release in RELEASES}
    places = {release.place for release in RELEASES}
    for name in needy:
        assert {choices[name].pretrained.folder, choices[name].autoencoder.folder} <= places


@pytest.mark.parametrize("model", dict.fromkeys(release.model for release in RELEASES))
def test_the_page_tells_what_the_list_tells(model: str):
    first, *others = releases.family(model)
    told = [f"`model={model}`", *first.licence.name.split(" and "), *first.commands, first.place]
    told += [Path(other.place).name.removeprefix("stable-audio-3-").removesuffix("-base") for other in others]
    assert [fact for fact in told if fact not in PAGE] == []


def test_a_whole_release_is_whole(release, capsys):
    assert spresso("weights", release) == 0
    out = capsys.readouterr().out
    assert "Stable Audio Open; licence: Stability AI Community License" in out
    assert re.findall(r"^  (D|AudioAE|text encoder) +ok ", out, re.MULTILINE) == ["D", "AudioAE", "text encoder"]
    assert "no published hash is at hand" in out


def trouble(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Return the lines that say what is missing or damaged."""
    return [line for line in capsys.readouterr().out.splitlines() if re.match(r"  \S+( \S+)* +no  ", line)]


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("vae/diffusion_pytorch_model.safetensors", "holds no diffusion_pytorch_model.safetensors"),
        ("vae/config.json", "has no vae/config.json"),
        ("scheduler/scheduler_config.json", "scheduler_config.json is missing"),
        ("text_encoder/model.safetensors", "holds no diffusion_pytorch_model.safetensors"),
    ],
)
def test_what_is_missing_is_named(copy, capsys, file, words):
    (copy / file).unlink()
    assert spresso("weights", copy) == 1
    assert any(words in line for line in trouble(capsys))


def test_a_file_that_was_cut_off_is_named_by_shape_and_by_hash(copy, capsys):
    file = copy / "transformer/diffusion_pytorch_model.safetensors"
    file.resolve().write_bytes(file.read_bytes()[:-100])
    assert spresso("weights", copy) == 1
    found = trouble(capsys)
    assert "is not a complete safetensors file" in found[0]
    assert found[1].startswith("  transformer/diffusion_pytorch_model.safetensors")


def test_a_flipped_bit_is_found_by_its_published_hash(copy, capsys):
    assert spresso("weights", copy) == 0
    assert re.search(r"hashes +ok +\d+ files are as the hub published them", capsys.readouterr().out)
    for name in ("vae/diffusion_pytorch_model.safetensors", "tokenizer/tokenizer_config.json"):
        file = (copy / name).resolve()
        content = bytearray(file.read_bytes())
        content[-2] ^= 1 if name.startswith("vae") else 0
        file.write_bytes(bytes(content) + (b"\n" if name.startswith("tok") else b""))
    assert spresso("weights", copy) == 1
    assert [line.split()[0] for line in trouble(capsys)] == [
        "tokenizer/tokenizer_config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]


def test_a_folder_of_hf_download_has_its_hashes_beside_it(release, tmp_path, capsys):
    content = (release / "vae/config.json").read_bytes()
    folder = tmp_path / "release"
    subprocess.run(["cp", "-r", release, folder], check=True)
    note = folder / ".cache/huggingface/download/vae/config.json.metadata"
    note.parent.mkdir(parents=True)
    digest = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    note.write_text(f"{'0' * 40}\n{digest}\n0.0\n")
    assert spresso("weights", folder) == 0
    assert "1 files are as the hub published them" in capsys.readouterr().out
    (folder / "vae/config.json").write_bytes(content + b"\n")
    assert spresso("weights", folder) == 1
    assert trouble(capsys)[0].startswith("  vae/config.json")


def test_the_authors_layout_is_told_with_the_command_that_converts_it(tmp_path, capsys):
    (tmp_path / "model_config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert spresso("weights", tmp_path) == 1
    (line,) = trouble(capsys)
    given = f"--checkpoint_path {tmp_path}/model.safetensors --model_config_path {tmp_path}/model_config.json"
    assert f"python convert_stable_audio_3_to_diffusers.py {given} --output_dir {tmp_path}-diffusers" in line


def test_an_archive_is_checked_by_the_hash_that_is_published_of_it(tmp_path, monkeypatch, capsys):
    archive = tmp_path / "Toy.zip"
    archive.write_bytes(b"toy")
    toy = Release("toy", "Toy", "D", "", CC_BY_NC, 1, "checkpoints/Toy", (), archive="Toy.zip",
                  sha256=hashlib.sha256(b"toy").hexdigest())  # fmt: skip
    monkeypatch.setattr("models.check_weights.RELEASES", (toy,))
    assert spresso("weights", archive) == 0
    archive.write_bytes(b"toz")
    assert spresso("weights", archive) == 1
    assert "is not the published one: download it again" in capsys.readouterr().out
    assert spresso("weights", archive.rename(tmp_path / "other.zip")) == 2


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nothing", "nothing is missing"),
        ("", "gives no weights that a recipe can start from"),
        ("a/b", "hf download a/b"),
    ],
)
def test_what_is_nothing_to_check_is_a_mistake(tmp_path, monkeypatch, capsys, name, words):
    monkeypatch.chdir(tmp_path)
    assert spresso("weights", name or tmp_path) == 2
    assert words in capsys.readouterr().err


def test_a_copy_in_the_cache_of_which_some_files_were_left_out_is_found(tmp_path, monkeypatch):
    """huggingface_hub lists what the hub has, and takes a copy without the pickles for one that is not there."""
    repo = tmp_path / "models--alice--door"
    (repo / "snapshots" / ("0" * 40) / "vae").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    (repo / "trees").mkdir()
    tree = '{"format_version": 1, "files": {"model.ckpt": {"size": 1, "blob_id": "0"}}}'
    (repo / "trees" / f"{'0' * 40}.json").write_text(tree)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert locate("alice/door") == repo / "snapshots" / ("0" * 40)


def test_hashes_and_licences_are_well_formed():
    assert all(bool(each.archive) == bool(re.fullmatch("[0-9a-f]{64}", each.sha256)) for each in RELEASES)
    assert len({each.sha256 for each in RELEASES if each.sha256}) == 3
    assert len({each.name for each in RELEASES}) == len(RELEASES)
    assert releases.release_at("/data/Woosh-Flow/") is RELEASES[1]
    assert releases.release_at("/data/mine") is None
