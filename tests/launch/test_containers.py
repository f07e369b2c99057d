"""Container images: what they are built from, and that the versions they pin are those that this project allows."""

from __future__ import annotations

import configparser
import re
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
CONTAINERS = ROOT / "launch" / "containers"
EXTRAS = ("stable_audio",)


def pins() -> dict[str, str]:
    """The pinned version of each package."""
    lines = (CONTAINERS / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def required() -> list[Requirement]:
    """What the images install on Linux: the project's own requirements and those of `EXTRAS`."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    texts = [setup["options"]["install_requires"], *(setup["options.extras_require"][extra] for extra in EXTRAS)]
    lines = [line.strip() for text in texts for line in text.splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("requirement", required(), ids=lambda requirement: requirement.name)
def test_each_requirement_is_pinned_within_its_bounds(requirement: Requirement):
    version = pins().get(canonicalize_name(requirement.name))
    assert version, f"launch/containers/constraints.txt pins no {requirement.name}"
    assert requirement.specifier.contains(version)


def test_each_package_is_pinned_once_and_exactly():
    lines = [line for line in (CONTAINERS / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line) for line in lines)
    assert lines == sorted(set(lines))
    assert len(pins()) == len(lines)


def test_both_images_copy_all_that_the_installation_reads():
    dockerfile, definition = ((CONTAINERS / name).read_text() for name in ("Dockerfile", "spresso.def"))
    docker_sources = {
        source for words in re.findall(r"^COPY (.+) /src", dockerfile, re.MULTILINE) for source in words.split()
    }
    apptainer_sources = set(re.findall(r"^    (\S+) /src/\1$", definition, re.MULTILINE))
    assert docker_sources == apptainer_sources
    assert all((ROOT / source).exists() for source in docker_sources)
    packages = {path.name for path in ROOT.iterdir() if path.is_dir() and list(path.glob("**/*.py"))}
    assert docker_sources >= {"setup.cfg", "pyproject.toml", "configs"} | packages - {"tests", "benchmarks", ".venv"}
    kept = re.findall(r"^!(\S+)$", (CONTAINERS / "Dockerfile.dockerignore").read_text(), re.MULTILINE)
    assert set(kept) == docker_sources


def test_both_images_start_from_one_pinned_debian_and_run_one_script():
    dockerfile, definition = ((CONTAINERS / name).read_text() for name in ("Dockerfile", "spresso.def"))
    [docker_base] = re.findall(r"^ARG BASE=(\S+)$", dockerfile, re.MULTILINE)
    [apptainer_base] = re.findall(r"^From: (\S+)$", definition, re.MULTILINE)
    assert docker_base == apptainer_base
    assert re.fullmatch(r"debian:12\.\d+-slim", docker_base)
    assert "install.sh" in dockerfile
    assert "install.sh" in definition


def test_the_docker_image_is_not_root_s():
    lines = (CONTAINERS / "Dockerfile").read_text().splitlines()
    assert [line for line in lines if line.startswith("USER ")] == ["USER spresso"]
    assert lines.index("USER spresso") > max(index for index, line in enumerate(lines) if line.startswith("RUN "))


def test_an_unknown_kind_of_torch_is_refused():
    done = subprocess.run(
        ["sh", str(CONTAINERS / "install.sh"), "rocm"], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "install.sh: TORCH=rocm is neither cpu nor cuda\n"
