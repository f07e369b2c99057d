"""A manifest that is signed but wrong is refused, or the checkpoint loads with the right numbers."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.mutant_counts import MutantCounts
from tests.trainer.checkpoints.test_checkpoint import META, blank, same, save, state
from trainer.checkpoints import checkpoint, inventory
from trainer.checkpoints.manifest import read_manifest, signed
from trainer.ranks.flat_ranges import FlatRange, equal_ranges, whole_ranges

NUMBERS = (-1, 0, 1, 3, 2**70, 1.5)
JUNK: tuple[Any, ...] = (None, True, *NUMBERS, "", "x", "../x", "\ud800", [], [0], [1, 2], [0, 10**9], {}, {"a": 1})


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """A checkpoint of three files, which one process writes as if it were three ranks, and its manifest."""
    directory = tmp_path_factory.mktemp("fuzz")
    files = {}
    for rank in range(3):
        ranges = equal_ranges(state(), rank=rank, world_size=3)
        parts = {name: part for name, part in ranges.items() if part.data.numel()}
        files |= written_as_rank(directory, rank, parts)
    path = save(directory, 8)
    (path / "rank_00000.safetensors").unlink()
    manifest = read_manifest(path) | {"files": files}
    for name in files:
        (directory / name).rename(path / name)
    (path / "manifest.json").write_text(signed(manifest))
    assert checkpoint.find_problems(path) == []
    return path, manifest


def written_as_rank(directory: Path, rank: int, parts: dict[str, FlatRange]) -> dict[str, Any]:
    """Write a file as a rank does, and return its entry in the manifest."""
    path = directory / f"rank_{rank:05d}.safetensors"
    ranges = {name: [part.start, part.stop] for name, part in parts.items()}
    return {path.name: {**checkpoint._write(path, parts), "ranges": ranges}}


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths to all values in a JSON document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in items for place in places(item, (*path, key)))]


def parent_of(document: Any, place: tuple[Any, ...]) -> Any:
    for key in place[:-1]:
        document = document[key]
    return document


def mutated(manifest: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    """Return a manifest with one to three mutations."""
    manifest = copy.deepcopy(manifest)
    kinds: list[Callable[[dict[str, Any], random.Random], None]] = [replace, remove, move_a_cut, swap, rename, shift]
    for _ in range(chance.choice((1, 1, 2, 3))):
        chance.choice(kinds)(manifest, chance)
    return manifest


def a_place(manifest: Any, chance: random.Random) -> tuple[Any, ...]:
    return chance.choice([place for place in places(manifest) if place])


def replace(manifest: Any, chance: random.Random) -> None:
    place = a_place(manifest, chance)
    parent_of(manifest, place)[place[-1]] = copy.deepcopy(chance.choice(JUNK))


def remove(manifest: Any, chance: random.Random) -> None:
    place = a_place(manifest, chance)
    del parent_of(manifest, place)[place[-1]]


def move_a_cut(manifest: Any, chance: random.Random) -> None:
    numbers = [place for place in places(manifest) if type(parent_of(manifest, place) if place else None) is list]
    if numbers:
        place = chance.choice(numbers)
        if type(parent_of(manifest, place)[place[-1]]) is int:
            parent_of(manifest, place)[place[-1]] += chance.choice((-7, -1, 1, 7))


def swap(manifest: Any, chance: random.Random) -> None:
    """Exchange two values of one object, for example the ranges of two tensors or the entries of two files."""
    objects = [
        place for place in places(manifest) if isinstance(at(manifest, place), dict) and len(at(manifest, place)) > 1
    ]
    if objects:
        chosen = at(manifest, chance.choice(objects))
        first, second = chance.sample(sorted(chosen), 2)
        chosen[first], chosen[second] = chosen[second], chosen[first]


def shift(manifest: Any, chance: random.Random) -> None:
    """Exchange the ranges of one tensor between two files: each element is still covered once."""
    files = list(manifest.get("files", {}).values()) if isinstance(manifest.get("files"), dict) else []
    tables = [entry["ranges"] for entry in files if isinstance(entry, dict) and isinstance(entry.get("ranges"), dict)]
    names = [name for name in {name: 0 for table in tables for name in table} if sum(name in t for t in tables) > 1]
    if names:
        name = chance.choice(names)
        first, second = [table for table in tables if name in table][:2]
        first[name], second[name] = second[name], first[name]


def rename(manifest: Any, chance: random.Random) -> None:
    place = chance.choice([place for place in places(manifest) if place and isinstance(place[-1], str)])
    parent = parent_of(manifest, place)
    parent[chance.choice(("x", "../up", "rank_00001.safetensors", "ema/f.bias", "n\0", "\ud800", "n" * 300))] = (
        parent.pop(place[-1])
    )


def at(document: Any, place: tuple[Any, ...]) -> Any:
    return parent_of(document, place)[place[-1]] if place else document


def try_many(written: tuple[Path, dict[str, Any]], seeds: range, counts: MutantCounts) -> tuple[int, int]:
    """Load under mutated manifests; return how many were refused, and how many gave the right numbers."""
    path, manifest = written
    refused = right = 0
    for seed in seeds:
        wrong = mutated(manifest, random.Random(seed))
        (path / "manifest.json").write_text(signed(wrong))
        tensors, told = blank(), ""
        counts.begin("manifests of checkpoints")
        try:
            checkpoint.load(path, whole_ranges(tensors))
        except ValueError as error:
            told = str(error)
        if told:
            assert told.startswith(f"{path} cannot be loaded: "), (seed, told)
            assert "\n" not in told, (seed, told)
            assert all(tensor.isnan().all() for tensor in tensors.values()), f"{seed}: something was filled"
            assert wrong != manifest, seed
            refused += 1
        else:
            assert same(tensors, state()), f"{seed}: loaded, but wrong"
            right += 1
        counts.end("manifests of checkpoints", refused=bool(told))
    (path / "manifest.json").write_text(signed(manifest))
    return refused, right


def test_a_hundred_wrong_manifests(written, mutant_counts):
    refused, right = try_many(written, range(100), mutant_counts)
    assert refused > 60
    assert refused + right == 100


@pytest.mark.slow
def test_thousands_of_wrong_manifests(written, mutant_counts):
    refused, right = try_many(written, range(100, 5100), mutant_counts)
    assert refused > 3000
    assert right > 0


def ranges(manifest: dict[str, Any], rank: int) -> dict[str, list[int]]:
    return manifest["files"][f"rank_{rank:05d}.safetensors"]["ranges"]


NAME = "param/g.blocks.0.weight"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda m: ranges(m, 0).pop(NAME), rf"no file holds the elements 0 to \d+ of {NAME}"),
        (lambda m: m["tensors"].update({NAME: [17, 12]}), rf"elements 192 to 204 of {NAME} after rank_0000\d"),
        (
            lambda m: m["tensors"].update({NAME: [15, 12]}),
            rf"rank_.* holds .* of {NAME} up to 192, but it has 180",
        ),
        (
            lambda m: ranges(m, 1).update({NAME: [0, 5]}),
            rf"both rank_.* and rank_.* hold .* 0 to 5 of {NAME}",
        ),
        (lambda m: m["tensors"].pop("ema/f.bias"), r"rank_\d+\.safetensors holds ema/f\.bias, which is not among"),
    ],
)
def test_a_gap_and_an_overlap_name_tensor_and_file(written, tmp_path, change, told):
    path, manifest = written
    wrong = copy.deepcopy(manifest)
    change(wrong)
    (path / "manifest.json").write_text(signed(wrong))
    try:
        with pytest.raises(ValueError, match=told):
            checkpoint.load(path, whole_ranges(blank()))
        assert any(re.search(told, problem) for problem in checkpoint.find_problems(path))
    finally:
        (path / "manifest.json").write_text(signed(manifest))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int32])
def test_a_file_of_another_type_is_refused(tmp_path, dtype):
    """The manifest fits the file to the byte; only the type tells."""
    path = checkpoint.save(tmp_path, 8, whole_ranges({"w": torch.arange(8.0)}), META)
    file = path / "rank_00000.safetensors"
    save_file({"w": torch.arange(8).to(dtype)}, file)
    manifest = read_manifest(path)
    entry = manifest["files"][file.name]
    entry |= {"bytes": file.stat().st_size, "sha256": checkpoint.file_digest(file)}
    (path / "manifest.json").write_text(signed(manifest))
    with pytest.raises(ValueError, match=r"rank_00000\.safetensors holds w as \w+ of the shape \[8\], but .* F32"):
        checkpoint.load(path, whole_ranges({"w": torch.zeros(8)}))
    assert len(checkpoint.find_problems(path)) == 1


def test_a_start_that_the_file_contradicts_is_refused(tmp_path):
    """Two files of equal parts, exchanged in the manifest: each element is covered once, by the wrong numbers."""
    path = checkpoint.save(tmp_path, 8, whole_ranges({"w": torch.arange(8.0)}), META)
    entries = {}
    for rank, start in enumerate((0, 4)):
        part = FlatRange(torch.arange(start, start + 4.0), (8,), start)
        entries |= written_as_rank(path, rank, {"w": part})
    manifest = read_manifest(path) | {"files": entries}
    (path / "manifest.json").write_text(signed(manifest))
    target = torch.zeros(8)
    checkpoint.load(path, whole_ranges({"w": target}))
    assert torch.equal(target, torch.arange(8.0))
    first, second = (entry["ranges"] for entry in entries.values())
    first["w"], second["w"] = second["w"], first["w"]
    (path / "manifest.json").write_text(signed(manifest))
    with pytest.raises(ValueError, match=r"rank_00000\.safetensors holds w from 0 on, but the manifest says 4"):
        checkpoint.load(path, whole_ranges({"w": target}))


def test_a_checkpoint_without_a_word_on_its_health_is_explained(tmp_path):
    path = checkpoint.save(tmp_path, 8, whole_ranges({"w": torch.zeros(8)}), META | {"health": None})
    assert "8 in " in inventory.explanation(path)
