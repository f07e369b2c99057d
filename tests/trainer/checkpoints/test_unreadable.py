"""A checkpoint that can't be read now is not a damaged one: nothing is renamed, passed over or begun anew."""

from __future__ import annotations

import errno
import io
import os
import pathlib
from pathlib import Path

import pytest

from tests.trainer.checkpoints.test_checkpoint import META, blank, flip_a_byte, same, save, state
from trainer.checkpoints import checkpoint, inventory, resume
from trainer.checkpoints.manifest import read_manifest, signed
from trainer.ranks.flat_ranges import whole_ranges
from trainer.recipes.reading import load_recipe
from trainer.run_directory import RunDirectory

NUMBERS = [errno.EIO, errno.EACCES, errno.ESTALE, errno.EMFILE, errno.ENFILE]
FILES = ["rank_00000.safetensors", "manifest.json"]


@pytest.fixture
def fail_to_open(monkeypatch):
    """Return a function after whose call files of a name can't be opened."""
    real, real_descriptor = io.open, os.open

    def fail(name: str, number: int, *, folder: str = "") -> None:
        def refuse(file) -> None:
            if not isinstance(file, int) and Path(file).name == name and folder in str(file):
                raise OSError(number, os.strerror(number), str(file))

        def open_(file, *arguments, **options):
            refuse(file)
            return real(file, *arguments, **options)

        def open_descriptor(file, *arguments, **options):
            refuse(file)
            return real_descriptor(file, *arguments, **options)

        monkeypatch.setattr(pathlib.io, "open", open_)
        monkeypatch.setattr(os, "open", open_descriptor)

    return fail


def decide(tmp_path: Path, choice: str = "auto") -> Path | None:
    run = RunDirectory(tmp_path / "pretrain", "pretrain")
    return resume.find_start(load_recipe("tiny", [f"checkpoint.resume={choice}"]), run, "c0ffee")


@pytest.fixture
def directory(tmp_path) -> Path:
    return tmp_path / "pretrain/checkpoints"


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("file", FILES)
def test_what_can_not_be_read_now_stops_the_start(tmp_path, directory, fail_to_open, number, file):
    older, newer = save(directory, 8), save(directory, 16)
    fail_to_open(file, number, folder=newer.name)
    with pytest.raises(OSError, match=r"can't be read now.*None was renamed.*repeat the command$") as error:
        decide(tmp_path)
    assert error.value.errno == number
    assert str(newer / file) in str(error.value)
    assert "\n" not in str(error.value)
    assert names(directory) == [older.name, newer.name]


@pytest.mark.parametrize("number", NUMBERS)
def test_checkpoints_without_a_config_must_be_readable_before_a_run_claims_them(
    tmp_path, directory, fail_to_open, number
):
    run = RunDirectory(tmp_path / "pretrain", "pretrain")
    for samples in (8, 16):
        save(directory, samples)
    (directory / "step_000000000024").mkdir()  # a damaged one is left to `find_start`
    resume.require_own_settings(run, {META["config"]})
    fail_to_open("manifest.json", number, folder="step_000000000016")
    with pytest.raises(OSError, match=r"16/manifest\.json .* can't be read now.*repeat the command$") as error:
        resume.require_own_settings(run, {META["config"]})
    assert error.value.errno == number


@pytest.mark.parametrize("number", NUMBERS)
def test_a_folder_that_can_not_be_listed_is_not_an_empty_one(tmp_path, directory, monkeypatch, number):
    save(directory, 8)

    def fail(folder: Path) -> None:
        raise OSError(number, os.strerror(number), str(folder))

    monkeypatch.setattr(Path, "iterdir", fail)
    with pytest.raises(OSError, match="can't be read now"):
        decide(tmp_path)


@pytest.mark.parametrize("file", FILES)
def test_a_load_that_fails_keeps_the_number(directory, fail_to_open, file):
    path = save(directory, 8)
    fail_to_open(file, errno.ESTALE)
    tensors = blank()
    with pytest.raises(OSError, match=file) as error:
        checkpoint.load(path, whole_ranges(tensors))
    assert error.value.errno == errno.ESTALE
    assert all(tensor.isnan().all() for tensor in tensors.values())


def test_pruning_keeps_what_can_not_be_read_now(directory, fail_to_open):
    for samples in (8, 16, 24):
        save(directory, samples)
    good = checkpoint.save(directory, 4, whole_ranges(state()), META | {"good": True})
    fail_to_open("manifest.json", errno.EIO, folder=good.name)
    checkpoint.prune(directory, last=1)
    assert names(directory) == [good.name, "step_000000000024"]


def test_the_listing_tells_damaged_from_unreadable(directory, fail_to_open):
    path = save(directory, 8)
    fail_to_open("manifest.json", errno.EIO)
    assert "can't be read now" in inventory.listing([path])
    assert "DAMAGED" not in inventory.listing([path])
    told, right = inventory.verification(path)
    assert "can't be read now, which is no sign of damage" in told
    assert not right


def damage_all(directory: Path) -> list[str]:
    for samples in (8, 16):
        flip_a_byte(save(directory, samples) / FILES[0], -1)
    return names(directory)


def test_no_run_begins_anew_beside_damaged_checkpoints(tmp_path, directory):
    before = damage_all(directory)
    for _ in range(2):  # the second start sees what the first one saw
        with pytest.raises(ValueError, match=r"no whole checkpoint, 2 damaged; .*step_0+16.*resume=never"):
            decide(tmp_path)
        assert names(directory) == before


def test_never_begins_anew_and_keeps_the_damaged_ones(tmp_path, directory):
    before = damage_all(directory)
    assert decide(tmp_path, "never") is None
    assert [name.rpartition("_")[0] for name in names(directory)] == [f"damaged_{name}" for name in before]


def test_another_checkpoint_may_be_named(tmp_path, directory):
    damage_all(directory)
    other = checkpoint.save(tmp_path / "other", 8, whole_ranges(state()), {"stage": "pretrain", "config": "c0ffee"})
    assert decide(tmp_path, str(other)) == other
    assert [name.split("_")[0] for name in names(directory)] == ["left", "left"]


def test_a_followed_path_does_not_hide_that_all_is_damaged(tmp_path, directory):
    other = checkpoint.save(tmp_path / "other", 8, whole_ranges(state()), {"stage": "pretrain", "config": "c0ffee"})
    directory.parent.mkdir()
    assert decide(tmp_path, str(other)) == other
    damage_all(directory)
    with pytest.raises(ValueError, match="holds no whole checkpoint"):
        decide(tmp_path, str(other))


def test_a_checkpoint_of_another_version_is_not_damaged(tmp_path, directory):
    older, newer = save(directory, 8), save(directory, 16)
    (newer / "manifest.json").write_text(signed(read_manifest(newer) | {"format": 2}))
    for choice in ("auto", "never"):
        with pytest.raises(ValueError, match=r"has format 2, but .* reads 1: use the version that wrote it"):
            decide(tmp_path, choice)
    assert names(directory) == [older.name, newer.name]


def test_permissions_are_the_users_to_give(tmp_path, directory):
    path = save(directory, 8)
    file = path / FILES[0]
    file.chmod(0)
    if os.access(file, os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(OSError, match="permission denied"):
        decide(tmp_path)
    file.chmod(0o600)
    assert decide(tmp_path) == path


def test_the_error_passes_and_the_checkpoint_is_used(tmp_path, directory, fail_to_open):
    path = save(directory, 8)
    fail_to_open(FILES[0], errno.EIO)
    with pytest.raises(OSError, match="can't be read now"):
        decide(tmp_path)
    fail_to_open("none", errno.EIO)
    assert decide(tmp_path) == path
    tensors = blank()
    checkpoint.load(path, whole_ranges(tensors))
    assert same(tensors, state())


@pytest.mark.parametrize("away", ["rank_00000.safetensors", "manifest.json", ""])
def test_a_link_to_what_is_away_stops_the_start(tmp_path, directory, away):
    older, newer = save(directory, 8), save(directory, 16)
    place, disk = newer / away if away else newer, tmp_path / "disk"
    place.rename(disk)
    place.symlink_to(disk)
    assert decide(tmp_path) == newer
    disk.rename(tmp_path / "away")
    with pytest.raises(OSError, match=r"is a link to .*disk, which is missing: .*None was renamed") as error:
        decide(tmp_path)
    assert str(place) in str(error.value)
    assert names(directory) == [older.name, newer.name]
    (tmp_path / "away").rename(disk)
    assert decide(tmp_path) == newer


def test_a_folder_of_checkpoints_that_is_away_is_not_taken_for_an_empty_one(tmp_path, directory):
    newer, disk = save(directory, 8), tmp_path / "disk"
    directory.rename(disk)
    directory.symlink_to(disk)
    assert decide(tmp_path) == newer
    disk.rename(tmp_path / "away")
    with pytest.raises(OSError, match=r"is a link to .*disk, which is missing: .*None was renamed"):
        decide(tmp_path)


def test_a_file_that_is_missing_is_damage(tmp_path, directory):
    older, newer = save(directory, 8), save(directory, 16)
    (newer / "rank_00000.safetensors").unlink()
    assert decide(tmp_path) == older
    assert not newer.exists()
