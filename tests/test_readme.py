"""The README's commands run on the tiny recipe; the docs' commands are at least parsed."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from launch.cli import parser
from launch.sweep.points import first_settings
from trainer.recipes.reading import load_recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
QUICK = ["parallel.threads=1", "parallel.device=cpu", "data.workers=1"]


def commands(text: str) -> list[str]:
    """Return the lines of a page's bash blocks without comments."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def small(command: str) -> list[str]:
    """Return the words of the same command on the tiny recipe."""
    words = shlex.split(command.replace("demo", "tiny").replace("=20000", "=128"))
    return [*words, *QUICK] if words[1] in ("run", "train", "plan", "evaluate", "page") else words


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Return a folder with a sound and a finished run of the tiny recipe, as `make demo` would leave it."""
    folder = tmp_path_factory.mktemp("readme")
    soundfile.write(folder / "in.wav", np.random.default_rng(0).normal(size=120_000) * 0.1, 48_000)
    run(["spresso", "run", "tiny", *QUICK], folder)
    return folder


def run(words: list[str], folder: Path) -> str:
    assert words[0] == "spresso"
    result = subprocess.run(
        [sys.executable, "-m", "launch.cli", *words[1:]],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


def test_readme_shows_the_two_commands():
    assert [line for line in commands(README) if line.startswith("make")] == ["make demo", "make test"]


def test_commands_of_the_readme_run(work):
    told = [line for line in commands(README) if line.startswith("spresso")]
    assert len(told) >= 5
    outputs = {command: run(small(command), work) for command in told}
    assert (work / "out.spr").stat().st_size > 0
    assert len(list(work.glob("back.*.wav"))) == 3
    assert "open " in next(text for command, text in outputs.items() if command.startswith("spresso run"))
    board = next(line for line in commands(README) if line.startswith("tensorboard"))
    assert list((work / board.split("--logdir ")[1]).rglob("events*"))


@pytest.mark.parametrize("target", ["demo", "test", "lint", "install"])
def test_make_knows_its_targets(target):
    result = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", ["sounds", "my sounds"])
def test_make_demo_passes_the_users_sounds_on(tmp_path, name):
    tmp_path = tmp_path / name
    tmp_path.mkdir()
    command = ["make", "-n", "demo", f"AUDIO={tmp_path}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert f'data.audio="{tmp_path}"' in result.stdout
    assert f'name="demo-{tmp_path.name}"' in result.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_the_docs_are_understood(page, monkeypatch):
    # the folders in the docs are examples: they appear to exist and to be empty
    monkeypatch.setattr(Path, "is_dir", lambda _: True)
    glob = Path.glob
    monkeypatch.setattr(Path, "glob", lambda path, pattern: glob(path, pattern) if path.exists() else iter(()))
    text = page.read_text().replace("\\\n", " ")
    for line in re.findall(r"^(?: {4})?(spresso .*)$", text, re.MULTILINE):
        words = shlex.split(re.sub(r"(?<!=)\[.*?\]", "", line).split("   ")[0].split("  #")[0])
        options = parser().parse_args(words[1:])
        if overrides := getattr(options, "overrides", None):
            if words[1] == "sweep":
                overrides = first_settings(overrides, None)
            recipe = options.recipe if options.recipe in ("demo", "tiny", "spresso_11hz") else "demo"
            load_recipe(recipe, [override for override in overrides if not override.startswith("stage=")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_of_the_docs_are_there(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target
