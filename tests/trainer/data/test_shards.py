from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from tests.trainer.data.older_sets import as_version_2
from trainer.data import shard_set as shard_set_module
from trainer.data.audio import encode_audio
from trainer.data.index import verify_folder
from trainer.data.index_row import INDEX_ROW, INDEX_ROW_WITH_AUDIO
from trainer.data.shard_set import ShardSet
from trainer.data.shards import (
    DamagedSample,
    SetInfo,
    ShardWriter,
    scan_shard,
    write_index,
)

CHANNELS, FRAMES, SAMPLES = 6, 11, 20
INFO = SetInfo("abc123", {"kind": "fake"}, sample_rate=8000, hop=80, latent_channels=CHANNELS, clip_seconds=0.1)


def latents(number: int, frames: int = FRAMES) -> np.ndarray:
    return np.random.default_rng(number).standard_normal((CHANNELS, frames)).astype(np.float16)


def audio(number: int) -> np.ndarray:
    return np.random.default_rng(number).uniform(-0.5, 0.5, (2, 800)).astype(np.float32)


def write_set(folder: Path, *, samples: int = SAMPLES, max_bytes: int = 20_000, with_audio: bool = False) -> ShardSet:
    with ShardWriter(folder, max_bytes=max_bytes) as writer:
        for number in range(samples):
            flac = encode_audio(audio(number), 8000, suffix=".flac") if with_audio else b""
            writer.write(f"s-{number:04d}", latents(number), {"caption": f"Tür {number}"}, flac=flac)
    write_index(folder, INFO, {name: scan_shard(folder / name) for name in writer.names})
    return ShardSet(folder)


@pytest.fixture
def shard_set(tmp_path: Path) -> ShardSet:
    return write_set(tmp_path / "set")


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_what_is_written_is_read_in_any_order(shard_set):
    assert len(shard_set) == SAMPLES
    assert shard_set.info == INFO
    assert shard_set.total_frames == SAMPLES * FRAMES
    assert shard_set.shortest_frames == FRAMES
    assert len(list(shard_set.folder.glob("*.tar"))) > 2
    ids = np.array([19, 0, 7, 7, 3, 12])
    for id_, read in zip(ids, shard_set.latents(ids), strict=True):
        assert read.dtype == np.float16
        np.testing.assert_array_equal(read, latents(id_))
    assert [shard_set.metadata(id_) for id_ in (0, 19)] == [{"caption": "Tür 0"}, {"caption": "Tür 19"}]
    assert shard_set.latents([]) == []


def test_a_set_of_an_older_version_is_read(tmp_path):
    newer = write_set(tmp_path, with_audio=True)
    expected = [(newer.metadata(id_), newer.audio(id_).tobytes()) for id_ in range(SAMPLES)]
    older = as_version_2(tmp_path)
    assert older.fingerprint == newer.fingerprint
    assert [(older.metadata(id_), older.audio(id_).tobytes()) for id_ in range(SAMPLES)] == expected
    assert verify_folder(tmp_path) == []
    flip(tmp_path / "00000.tar", older.index[0]["json_offset"])
    with pytest.raises(DamagedSample, match=r"s-0000\.json is not JSON"):
        older.metadata(0)


def test_metadata_that_is_still_json_is_not_believed(shard_set):
    row = shard_set.index[3]
    path, end = shard_set.paths[row["shard"]], int(row["json_offset"] + row["json_length"])
    content = bytearray(path.read_bytes())
    assert content[end - 3 : end] == b'3"}'
    content[end - 3] = ord("4")
    path.write_bytes(content)
    with pytest.raises(DamagedSample, match=r"s-0003\.json does not have the checksum that is in the index"):
        shard_set.metadata(3)
    assert shard_set.metadata(4) == {"caption": "Tür 4"}


@pytest.mark.parametrize("way", ["exchanged", "gone"])
def test_metadata_of_another_sample_is_not_believed_in_a_large_index(tmp_path, monkeypatch, way):
    """An index that is mapped is not compared with its checksum."""
    write_set(tmp_path)
    index = np.load(tmp_path / "index.npy")
    if way == "gone":
        index["json_length"][2] = 0
    else:
        for name in ("json_offset", "json_length", "json_crc32"):
            index[name][[2, 3]] = index[name][[3, 2]]
    np.save(tmp_path / "index.npy", index)
    monkeypatch.setattr(shard_set_module, "_MOST_READ", 0)
    with pytest.raises(DamagedSample, match=r"s-0003\.json does not have" if way == "exchanged" else r"index\.npy is"):
        ShardSet(tmp_path).metadata(2)


def test_audio_is_kept_where_it_is_given(tmp_path, shard_set):
    with_audio = write_set(tmp_path / "audio", with_audio=True, max_bytes=60_000)
    assert with_audio.has_audio
    np.testing.assert_allclose(with_audio.audio(13), audio(13), atol=2**-23)
    np.testing.assert_array_equal(with_audio.latents([13])[0], latents(13))
    assert not shard_set.has_audio
    with pytest.raises(ValueError, match="latents without their audio"):
        shard_set.audio(0)


def test_a_row_of_the_index_is_small():
    assert INDEX_ROW.itemsize == 40
    assert INDEX_ROW_WITH_AUDIO.names[: len(INDEX_ROW.names)] == INDEX_ROW.names


def test_clips_of_different_lengths(tmp_path):
    with ShardWriter(tmp_path) as writer:
        for number, frames in enumerate([5, 3, 9]):
            writer.write(f"s{number}", latents(number, frames), {})
    write_index(tmp_path, INFO, {name: scan_shard(tmp_path / name) for name in writer.names})
    shards = ShardSet(tmp_path)
    assert (shards.shortest_frames, shards.total_frames) == (3, 17)
    assert [x0.shape for x0 in shards.latents([2, 0, 1])] == [(CHANNELS, 9), (CHANNELS, 5), (CHANNELS, 3)]


def test_shards_stay_below_their_size_and_are_deterministic(tmp_path, shard_set):
    shards = sorted(shard_set.folder.glob("*.tar"))
    assert all(path.stat().st_size <= 20_000 for path in shards)
    assert [path.name for path in shards] == [f"{number:05d}.tar" for number in range(len(shards))]
    again = write_set(tmp_path / "again")
    for path in shard_set.folder.iterdir():
        assert path.read_bytes() == (again.folder / path.name).read_bytes()


def test_a_sample_larger_than_a_shard_has_its_own(tmp_path):
    shards = write_set(tmp_path, samples=3, max_bytes=100)
    assert len(list(tmp_path.glob("*.tar"))) == 3
    np.testing.assert_array_equal(shards.latents([2])[0], latents(2))


def test_tar_reads_our_shards(shard_set):
    path = shard_set.folder / "00000.tar"
    listed = subprocess.run(["tar", "tf", path], check=True, capture_output=True, text=True).stdout.split()
    assert listed[:4] == ["s-0000.x0.npy", "s-0000.json", "s-0001.x0.npy", "s-0001.json"]
    with tarfile.open(path) as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.uname, member.mode) == (0, 0, "", 0o644)
            assert member.pax_headers == {}
    assert path.read_bytes()[257:265] == b"ustar\x0000"


def test_webdataset_reads_our_shards(tmp_path):
    shards = write_set(tmp_path, with_audio=True)
    urls = [str(path) for path in sorted(tmp_path.glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == [f"s-{number:04d}" for number in range(SAMPLES)]
    np.testing.assert_array_equal(samples[7]["x0.npy"], latents(7))
    assert samples[7]["json"] == {"caption": "Tür 7"}
    assert samples[7]["flac"][:4] == b"fLaC"
    assert len(shards) == SAMPLES


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_other_programs_tars_are_indexed(tmp_path, tar_format):
    """Members of a sample apart from each other, other files between, folders, upper case, long names."""
    names = ["./sub/a.b/s0", "sub/s1", ("long/" * 24 + "s2") if tar_format != tarfile.USTAR_FORMAT else "s2"]
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / f"{name}.x0.npy", latents(number))
        (tmp_path / f"{name}.JSON").write_text(json.dumps({"number": number}))
        (tmp_path / f"{name}.txt").write_text("more")
    with tarfile.open(tmp_path / "other.tar", "w", format=tar_format) as tar:
        tar.add(tmp_path / "sub", "sub", recursive=False)
        for kind in ("x0.npy", "txt", "JSON"):
            for name in names:
                tar.add(tmp_path / f"{name}.{kind}", f"{name}.{kind}")
    write_index(tmp_path, INFO, {"other.tar": scan_shard(tmp_path / "other.tar")})
    shards = ShardSet(tmp_path)
    assert [shards.metadata(id_)["number"] for id_ in range(3)] == [0, 1, 2]
    for number, x0 in enumerate(shards.latents([0, 1, 2])):
        np.testing.assert_array_equal(x0, latents(number))


def test_a_shard_appears_whole_or_not_at_all(tmp_path):
    writer = ShardWriter(tmp_path, max_bytes=20_000)

    def write_half() -> None:
        with writer:
            for number in range(SAMPLES):
                writer.write(f"s-{number:04d}", latents(number), {})
                for path in tmp_path.glob("*.tar"):
                    assert path.read_bytes().endswith(bytes(1024))
            raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        write_half()
    complete = sorted(path.name for path in tmp_path.iterdir())
    assert complete == writer.names[:-1]
    assert sum(len(scan_shard(tmp_path / name)) for name in complete) < SAMPLES


@pytest.mark.parametrize("key", ["", "a.b", "a/b", "ü", "a b", "x" * 81])
def test_keys_that_other_programs_would_misread_are_refused(tmp_path, key):
    with ShardWriter(tmp_path) as writer, pytest.raises(ValueError, match="sample key"):
        writer.write(key, latents(0), {})


@pytest.mark.parametrize("x0", [np.zeros((2, 3), np.float32), np.zeros(3, np.float16)])
def test_other_latents_are_refused(tmp_path, x0):
    with ShardWriter(tmp_path) as writer, pytest.raises(ValueError, match="float16"):
        writer.write("a", x0, {})
    assert not list(tmp_path.iterdir())


def test_a_flipped_bit_is_found_and_named(shard_set):
    row = shard_set.index[9]
    path = shard_set.folder / f"{row['shard']:05d}.tar"
    for byte in (0, row["x0_length"] - 1):
        flip(path, row["x0_offset"] + byte)
        with pytest.raises(DamagedSample, match=f"{path} is damaged at byte {row['x0_offset']}: the checksum is wrong"):
            shard_set.latents([0, 9])
        flip(path, row["x0_offset"] + byte)
    np.testing.assert_array_equal(shard_set.latents([9])[0], latents(9))


@pytest.mark.parametrize("column", ["shard", "frames", "x0_offset", "x0_length", "x0_crc32"])
def test_a_damaged_row_of_the_index_is_found(shard_set, column):
    index = np.array(shard_set.index)
    index[column][4] ^= np.array(1 << 10, index.dtype[column])
    np.save(shard_set.folder / "index.npy", index)
    with pytest.raises(ValueError, match=r"index\.npy does not match set\.json"):
        ShardSet(shard_set.folder)
    damaged = ShardSet(shard_set.folder, verify=False)
    with pytest.raises(DamagedSample, match="damaged"):
        damaged.latents(range(SAMPLES))


def test_a_sample_that_is_longer_than_its_row_fills_no_other(tmp_path):
    with ShardWriter(tmp_path) as writer:
        for number, frames in enumerate((FRAMES, FRAMES + 1, FRAMES)):
            writer.write(f"s{number}", latents(number, frames), {})
    write_index(tmp_path, INFO, {name: scan_shard(tmp_path / name) for name in writer.names})
    out = np.empty((3, CHANNELS * FRAMES), np.float16)
    assert list(ShardSet(tmp_path).read(np.arange(3), out)) == [1]
    for number in (0, 2):
        np.testing.assert_array_equal(out[number], latents(number).ravel())


def test_damaged_metadata_and_audio_are_found(tmp_path):
    shards = write_set(tmp_path, with_audio=True)
    row = shards.index[0]
    flip(tmp_path / "00000.tar", row["flac_offset"] + row["flac_length"] // 2)
    with pytest.raises(DamagedSample, match="checksum"):
        shards.audio(0)
    flip(tmp_path / "00000.tar", row["json_offset"])
    with pytest.raises(
        DamagedSample, match=f"00000.tar is damaged at byte {row['json_offset']}: s-0000.json does not have"
    ):
        shards.metadata(0)


def test_a_shard_that_shrinks_while_it_is_read(shard_set):
    last = SAMPLES - 1
    path = shard_set.folder / f"{shard_set.index[last]['shard']:05d}.tar"
    path.write_bytes(path.read_bytes()[: shard_set.index[last]["x0_offset"] + 5])
    with pytest.raises(DamagedSample, match="truncated"):
        shard_set.latents([last])


@pytest.mark.parametrize(("break_it", "message"), [
    (lambda folder: (folder / "set.json").unlink(), "set.json is missing: .*spresso prepare"),
    (lambda folder: (folder / "index.npy").unlink(), "index.npy is missing: .*spresso prepare"),
    (lambda folder: (folder / "00001.tar").unlink(), "00001.tar is missing: .*prepare"),
    (lambda folder: (folder / "00001.tar").write_bytes(b"x"), "00001.tar has 1 bytes, but set.json says .*prepare"),
    (lambda folder: (folder / "set.json").write_text('{"version'), "damaged .*prepare"),
    (lambda folder: (folder / "set.json").write_text('{"version": 99}'), "another version .*prepare"),
    (lambda folder: (folder / "index.npy").write_bytes(b""), "damaged .*prepare"),
    (lambda folder: (folder / "index.npy").write_bytes((folder / "index.npy").read_bytes()[:-1]), "damaged .*prepare"),
    (lambda folder: np.save(folder / "index.npy", np.zeros(SAMPLES)), "does not match set.json.*prepare"),
    (lambda folder: np.save(folder / "index.npy", np.zeros(3, INDEX_ROW)), "does not match set.json.*prepare"),
    (shutil.rmtree, "set.json is missing"),
])  # fmt: skip
def test_a_set_with_other_files_than_its_index_says_is_refused(shard_set, break_it, message):
    break_it(shard_set.folder)
    with pytest.raises(ValueError, match=message):
        ShardSet(shard_set.folder)


def test_the_fingerprint_tells_sets_apart(tmp_path, shard_set):
    assert write_set(tmp_path / "same").fingerprint == shard_set.fingerprint
    assert write_set(tmp_path / "in one shard", max_bytes=1 << 20).fingerprint == shard_set.fingerprint
    assert write_set(tmp_path / "fewer", samples=SAMPLES - 1).fingerprint != shard_set.fingerprint
    names = sorted(path.name for path in shard_set.folder.glob("*.tar"))
    write_index(shard_set.folder, INFO, {name: scan_shard(shard_set.folder / name) for name in reversed(names)})
    reordered = ShardSet(shard_set.folder)
    assert reordered.fingerprint != shard_set.fingerprint
    assert reordered.metadata(SAMPLES - 1) != {"caption": f"Tür {SAMPLES - 1}"}


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            (path.parent / "member").write_bytes(content)
            tar.add(path.parent / "member", name)
    return path


def npy(array: np.ndarray, folder: Path) -> bytes:
    np.save(folder / "array.npy", array)
    return (folder / "array.npy").read_bytes()


def test_tars_that_hold_something_else_are_refused(tmp_path):
    good, path = npy(latents(0), tmp_path), tmp_path / "a.tar"
    for members, message in [
        ({"a.json": b"{}"}, "has no a.x0.npy"),
        ({"a.x0.npy": good, "a.json": b"{}", "a.flac": b"x", "b.x0.npy": good, "b.json": b"{}"}, "has no b.flac"),
        ({"a.x0.npy": good, "a.json": b"{}", "a.JSON": b"{}"}, "a.JSON twice"),
        ({"a.x0.npy": b"nothing", "a.json": b"{}"}, r"a.x0.npy is not a .npy array"),
        ({"a.x0.npy": good[:-1], "a.json": b"{}"}, "is not a whole float16 matrix"),
        ({"a.x0.npy": npy(latents(0).astype(np.float32), tmp_path), "a.json": b"{}"}, "float16"),
        ({"a.x0.npy": npy(np.asfortranarray(latents(0)), tmp_path), "a.json": b"{}"}, "in C order"),
    ]:
        with pytest.raises(ValueError, match=f"{path}.*{message}"):
            scan_shard(tar_of(path, members))
    with pytest.raises(ValueError, match="no sample"):
        write_index(tmp_path, INFO, {"a.tar": scan_shard(tar_of(path, {}))})
    with pytest.raises(ValueError, match=r"some shards .* have audio"):
        write_index(tmp_path, INFO, {"a.tar": np.zeros(1, INDEX_ROW), "b.tar": np.zeros(1, INDEX_ROW_WITH_AUDIO)})
    other_channels = {"a.x0.npy": npy(np.zeros((CHANNELS + 1, 3), np.float16), tmp_path), "a.json": b"{}"}
    with pytest.raises(ValueError, match=f"have {CHANNELS} channels"):
        write_index(tmp_path, INFO, {"a.tar": scan_shard(tar_of(path, other_channels))})


@pytest.mark.parametrize("kept", [0, 100, 700, 1500, 5000])
def test_a_truncated_tar_is_refused(shard_set, kept):
    path = shard_set.folder / "00000.tar"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=str(path)):
        scan_shard(path)
