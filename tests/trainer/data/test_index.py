"""Tars that others made become sets, and sets are held against their tars."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from launch.cli import main
from trainer.data.index import index_folder, verify_folder
from trainer.data.shard_set import ShardSet
from trainer.data.shards import SetInfo
from trainer.data.stream import LatentStream

CHANNELS, FRAMES = 128, 9
INFO = SetInfo("a", {}, sample_rate=48_000, hop=480, latent_channels=CHANNELS, clip_seconds=0.09)


def latents(number: int) -> np.ndarray:
    return np.full((CHANNELS, FRAMES), number, np.float16) + np.arange(FRAMES, dtype=np.float16) / 16


def npy(number: int) -> bytes:
    file = io.BytesIO()
    np.save(file, latents(number))
    return file.getvalue()


def by_webdataset(folder: Path) -> None:
    for shard in range(3):
        with webdataset.TarWriter(str(folder / f"{shard}.tar")) as writer:
            for number in range(4 * shard, 4 * shard + 4):
                writer.write(
                    {"__key__": f"sub/k{number:02d}", "x0.npy": npy(number), "json": {"caption": f"c{number}"}}
                )


def by_tar(folder: Path, *options: str) -> None:
    """GNU tar, names of over a hundred characters, other files between, no JSON."""
    files = folder / "files" / ("long" * 20) / ("names" * 20)
    files.mkdir(parents=True)
    for number in range(12):
        (files / f"k{number:02d}.x0.npy").write_bytes(npy(number))
        (files / f"k{number:02d}.txt").write_text("not ours")
    subprocess.run(["tar", "--sort=name", *options, "-cf", folder / "0.tar", "-C", folder, "files"], check=True)
    shutil.rmtree(folder / "files")


MAKERS = {
    "webdataset": by_webdataset,
    "gnu": by_tar,
    "pax": lambda folder: by_tar(folder, "--format=pax"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    by_webdataset(tmp_path)
    return tmp_path


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("workers", [1, 2])
def test_tars_of_others_are_read(tmp_path, maker, workers):
    MAKERS[maker](tmp_path)
    seen: list[tuple[int, int]] = []
    shard_set = index_folder(tmp_path, INFO, workers=workers, progress=lambda *done: seen.append(done))
    assert len(shard_set) == 12
    assert seen[-1] == (len(shard_set.paths), len(shard_set.paths))
    for id_, x0 in enumerate(shard_set.latents(range(12))):
        np.testing.assert_array_equal(x0, latents(id_))
        assert shard_set.metadata(id_) == ({"caption": f"c{id_}"} if maker == "webdataset" else {})
    batch = LatentStream(shard_set, crop_frames=5, global_batch=12, seed=0).batch(0)
    assert sorted(batch.ids.tolist()) == list(range(12))
    assert verify_folder(tmp_path, workers=workers) == []


def test_the_command_indexes_and_verifies(folder, capsys):
    assert main(["index", str(folder), "--autoencoder", "spectral"]) == 0
    assert ShardSet(folder).info.sample_rate == 48_000
    assert main(["index", str(folder), "--verify"]) == 0
    assert "12 samples in 3 shards" in capsys.readouterr().err
    (folder / "1.tar").unlink()
    assert main(["index", str(folder), "--verify"]) == 2
    assert "1.tar is missing" in capsys.readouterr().err
    # a stale index is made anew, of the same autoencoder
    assert main(["index", str(folder)]) == 0
    assert len(ShardSet(folder)) == 8


def test_the_command_takes_both_parts_of_a_folder(tmp_path, capsys):
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
        by_webdataset(tmp_path / part)
    assert main(["index", str(tmp_path), "--autoencoder", "spectral"]) == 0
    assert main(["index", str(tmp_path), "--verify"]) == 0
    assert capsys.readouterr().err.count("12 samples in 3 shards, all match the index") == 2
    for part in ("train", "test"):
        flip(tmp_path / part / "1.tar", int(ShardSet(tmp_path / part).index["x0_offset"][5]) + 3)
    assert main(["index", str(tmp_path), "--verify"]) == 2
    told = capsys.readouterr().err
    assert "train/1.tar at byte" in told
    assert "test/1.tar at byte" in told


def test_tars_without_an_autoencoder_to_their_name_are_refused(folder, capsys):
    assert main(["index", str(folder)]) == 2
    assert "--autoencoder" in capsys.readouterr().err


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_verify_names_what_is_damaged(folder):
    shard_set = index_folder(folder, INFO)
    row = shard_set.index[5]
    flip(folder / "1.tar", int(row["x0_offset"]) + 3)
    [problem] = verify_folder(folder)
    assert problem == f"{folder}/1.tar at byte {row['x0_offset']}: the sample is not the one in the index"
    shutil.copy(folder / "0.tar", folder / "7.tar")
    assert verify_folder(folder)[0] == f"not in the index: 7.tar; run `spresso index {folder}`"


def test_verify_finds_a_damaged_index(folder):
    index_folder(folder, INFO)
    flip(folder / "index.npy", -1 - ShardSet(folder).index.dtype.itemsize)
    assert any(
        "index.npy is damaged" in problem or "not the one in the index" in problem for problem in verify_folder(folder)
    )


def test_a_key_in_two_shards(folder):
    shutil.copy(folder / "0.tar", folder / "7.tar")
    with pytest.raises(ValueError, match=r"key sub/k00 is in both 0.tar and 7.tar: rename or remove one"):
        index_folder(folder, INFO)


def test_a_key_twice_in_a_shard(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for _ in range(2):
            member = tarfile.TarInfo("k.x0.npy")
            member.size = len(npy(0))
            tar.addfile(member, io.BytesIO(npy(0)))
    with pytest.raises(ValueError, match=r"holds k\.x0\.npy twice"):
        index_folder(tmp_path, INFO)


def test_folders_without_shards(tmp_path):
    with pytest.raises(ValueError, match=r"holds no \.tar$"):
        index_folder(tmp_path, INFO)
    (tmp_path / "0.tar.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"0\.tar\.gz is compressed, .* unpack it"):
        index_folder(tmp_path, INFO)
    with tarfile.open(tmp_path / "0.tar", "w"):
        pass
    with pytest.raises(ValueError, match=r"0\.tar holds no sample"):
        index_folder(tmp_path, INFO)


def test_a_truncated_tar(folder):
    content = (folder / "1.tar").read_bytes()
    for length in (700, 5000, len(content) // 2):
        (folder / "1.tar").write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"1\.tar"):
            index_folder(folder, INFO)


def test_a_row_of_the_index_is_small(folder):
    shard_set = index_folder(folder, INFO)
    assert shard_set.index.dtype.itemsize == 40
    assert json.loads((folder / "set.json").read_text())["samples"] == 12
