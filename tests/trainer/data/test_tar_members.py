"""A tar gives all its files and links with the right content, or is refused with its name and the member's."""

from __future__ import annotations

import gzip
import os
import re
import subprocess
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from launch.cli import main
from tests.trainer.data.older_sets import as_version_2
from tests.trainer.data.raw_tars import CHANNELS, END, header, latents, member, npy, npy_with_header, pax, with_checksum
from trainer.data.index import index_folder, verify_folder
from trainer.data.shard_set import ShardSet
from trainer.data.shards import DamagedSample, SetInfo, find_members, scan_shard
from trainer.data.tar_members import find_tar_members

INFO = SetInfo("a", {}, sample_rate=48_000, hop=480, latent_channels=CHANNELS, clip_seconds=0.09)
VALUES = npy(latents(0))
SAMPLE = member(b"k.x0.npy", VALUES)
GOOD = SAMPLE + member(b"k.json", b"{}")


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def refusal(path: Path) -> str:
    """Return the one line with which a tar is refused; it names the tar."""
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        scan_shard(path)
    said = str(caught.value)
    assert said.isprintable()
    assert len(said) < 1000
    return said.removeprefix(str(path)).lstrip(": ")


def test_what_tar_packs_is_found(tmp_path):
    """GNU tar's own formats, with hard and symbolic links, long names, a label and folders."""
    files = tmp_path / "files" / ("long" * 30)
    files.mkdir(parents=True)
    (tmp_path / "files" / "again").symlink_to(files.name)
    for number in range(4):
        (files / f"k{number}.x0.npy").write_bytes(npy(latents(number)))
    (files / "k0.json").write_text('{"caption": "rain"}')
    (files / "k1.json").hardlink_to(files / "k0.json")
    (files / "k2.json").symlink_to("k0.json")
    (files / "k3.json").symlink_to(f"../{files.name}/k2.json")
    for form in ("gnu", "oldgnu", "posix"):
        folder = tmp_path / form
        folder.mkdir()
        pack = ["tar", f"--format={form}", "--sort=name", "--label=mine", "-cf", folder / "0.tar"]
        subprocess.run([*pack, "-C", tmp_path, "files"], check=True)
        shard_set = index_folder(folder, INFO)
        assert len(shard_set) == 4
        for id_, x0 in enumerate(shard_set.latents(range(4))):
            np.testing.assert_array_equal(x0, latents(id_))
            assert shard_set.metadata(id_) == {"caption": "rain"}
        assert verify_folder(folder) == []


def test_links_to_what_the_tar_lacks_are_refused(tmp_path):
    path = tmp_path / "a.tar"
    for link in (b"../other.npy", b"/k.x0.npy", b"nowhere", b"l.x0.npy", b""):
        write(path, GOOD + member(b"l.x0.npy", kind=b"2", link=link) + END)
        assert re.match(r"l\.x0\.npy is a link to \S+, which the tar does not hold", refusal(path))
    for link in (b"nowhere", b"l.x0.npy", b"later.x0.npy"):
        hard_link = member(b"l.x0.npy", kind=b"1", link=link)
        write(path, GOOD + hard_link + member(b"later.x0.npy", VALUES) + END)
        assert refusal(path).startswith(f"l.x0.npy is a hard link to {link.decode()}, which is no member before it")
    write(path, GOOD + member(b"l.json", kind=b"6") + END)
    assert refusal(path).startswith("l.json is a pipe or a device")
    # what belongs to no sample does not matter
    write(path, GOOD + member(b"latest", kind=b"2", link=b"/elsewhere") + member(b"p", kind=b"6") + END)
    assert list(find_members(path)) == ["k"]


def test_a_long_chain_of_links_ends(tmp_path):
    chain = b"".join(member(b"l%d.x0.npy" % at, kind=b"2", link=b"l%d.x0.npy" % (at + 1)) for at in range(3000))
    path = write(tmp_path / "a.tar", chain + member(b"l3000.x0.npy", VALUES) + END)
    assert "l0.x0.npy is a link to l1.x0.npy" in refusal(path)


def sparse_tar(folder: Path, *options: str) -> None:
    """Pack latents with a hole, a whole file of them last."""
    (folder / "files").mkdir(parents=True)
    content = bytearray(npy(latents(0, 130)))
    content[4096:24576] = bytes(20480)
    with (folder / "files" / "k0.x0.npy").open("wb") as file:
        file.write(content[:4096])
        file.seek(24576)
        file.write(content[24576:])
    (folder / "files" / "k1.x0.npy").write_bytes(VALUES)
    pack = ["tar", "--sparse", *options, "--sort=name", "-cf", folder / "0.tar", "-C", folder, "files"]
    subprocess.run(pack, check=True)


@pytest.mark.parametrize("form", ["gnu", "oldgnu", "posix", "0.0", "0.1"])
def test_sparse_members_are_refused(tmp_path, form):
    options = [f"--format={form}"] if form.isalpha() else ["--format=posix", f"--sparse-version={form}"]
    sparse_tar(tmp_path, *options)
    with tarfile.open(tmp_path / "0.tar") as tar:
        assert [info.issparse() for info in tar if info.isfile()] == [True, False]
    said = refusal(tmp_path / "0.tar")
    assert re.match(r"holds files/k0\.x0\.npy at byte \d+, a sparse member, .*without `--sparse`", said)


def test_verify_finds_a_sparse_member_that_was_indexed_before(tmp_path):
    """An index that another release made of a sparse member."""
    (tmp_path / "0.tar").write_bytes(GOOD + END)
    index_folder(tmp_path, INFO)
    content = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(with_checksum(content[:156] + b"S" + content[157:512]) + content[512:])
    [problem] = verify_folder(tmp_path)
    assert problem.startswith(f"{tmp_path}/0.tar holds k.x0.npy at byte 0, a sparse member")


def test_a_volume_of_several_is_refused(tmp_path):
    (tmp_path / "k0.x0.npy").write_bytes(npy(latents(0, 130)))
    volumes = [tmp_path / "0.tar", tmp_path / "1.tar"]
    pack = ["tar", "-c", "--multi-volume", "--tape-length=20", *(f"--file={path}" for path in volumes)]
    subprocess.run([*pack, "-C", tmp_path, "k0.x0.npy"], check=True)
    assert refusal(volumes[0]).startswith("is not a whole tar file: k0.x0.npy at byte 0 has ")
    assert refusal(volumes[1]).startswith("holds k0.x0.npy at byte 0, a part of a file that begins in another volume")
    write(tmp_path / "2.tar", pax({"GNU.volume.filename": b"k"}, kind=b"g") + GOOD + END)
    assert "a part of a file that begins in another volume" in refusal(tmp_path / "2.tar")


def test_joined_tars_are_refused(tmp_path):
    path = write(tmp_path / "a.tar", SAMPLE + END + member(b"l.x0.npy", VALUES) + END)
    second = len(SAMPLE + END)
    assert refusal(path).startswith(f"consists of several tars, of which the second begins at byte {second}: ")
    write(path, SAMPLE + END[:512] + member(b"l.x0.npy", VALUES) + END)
    assert f"begins at byte {second - 512}" in refusal(path)
    write(path, SAMPLE + END + bytes(700) + b"junk" + END)
    assert f"at byte {second + 700}, bytes of no member follow" in refusal(path)
    # zeros may follow in any number
    write(path, SAMPLE + END + bytes(3 << 20))
    assert list(find_members(path)) == ["k"]


def test_a_flipped_bit_in_any_header_loses_no_sample(tmp_path):
    first, content = len(SAMPLE), bytearray(SAMPLE + member(b"l.x0.npy", VALUES) + END)
    for at in (0, first):
        for byte in (*range(12), 124, 134, 156, 257):
            content[at + byte] ^= 4
            said = refusal(write(tmp_path / "a.tar", bytes(content)))
            assert said == f"is not a whole tar file: the header at byte {at} is damaged"
            content[at + byte] ^= 4
    assert len(scan_shard(write(tmp_path / "a.tar", bytes(content)))) == 2


def test_files_of_macos_are_left_out(tmp_path):
    double = b"\x00\x05\x16\x07\x00\x02\x00\x00" + bytes(100)
    hidden = member(b"d/._k.x0.npy", double) + member(b"d/.DS_Store", b"x") + member(b"d/k.x0.npy", VALUES)
    write(tmp_path / "0.tar", member(b"._d", double) + hidden + END)
    (tmp_path / "._0.tar").write_bytes(double)
    assert len(index_folder(tmp_path, INFO)) == 1
    assert verify_folder(tmp_path) == []
    # latents without a key are not left out
    assert refusal(write(tmp_path / "1.tar", member(b"._k.x0.npy", VALUES) + END)).startswith("._k.x0.npy has no key")
    assert refusal(write(tmp_path / "1.tar", member(b".x0.npy", VALUES) + END)).startswith(".x0.npy has no key")


@pytest.mark.parametrize("other", [b"k.x0.npy", b"./k.x0.npy", b"a/..//k.X0.NPY", b"/k.x0.npy"])
def test_a_name_twice_is_refused(tmp_path, other):
    for twin in (member(other, VALUES), member(other, kind=b"1", link=b"k.x0.npy")):
        assert refusal(write(tmp_path / "a.tar", GOOD + twin + END)).endswith(" twice")


def test_a_dotted_folder_does_not_part_a_sample(tmp_path):
    write(tmp_path / "0.tar", member(b"./d/k.json", b'{"n": 1}') + member(b"d/k.x0.npy", VALUES) + END)
    assert index_folder(tmp_path, INFO).metadata(0) == {"n": 1}


LIARS = {
    "a size past the end": header(b"k.x0.npy", 1 << 32),
    "a binary size of 2^80": header(b"k.x0.npy", b"\x80\0" + (1 << 79).to_bytes(10)),
    "a negative size": header(b"k.x0.npy", b"\xff" * 11 + b"\xfe"),
    "a size that is no number": header(b"k.x0.npy", b"-0000000512\0"),
    "a size with an underscore": header(b"k.x0.npy", b"0_000000010\0"),
    "a long name of 2^33 bytes": header(b"././@LongLink", b"\x80\0\0\0" + (1 << 33).to_bytes(8), kind=b"L"),
    "a long name that never comes": member(b"././@LongLink", b"k" * 200 + b"\0", kind=b"L"),
    "an empty long name": header(b"k.json", 0, kind=b"L") + SAMPLE,
    "two long names": member(b"L", b"a.x0.npy\0", kind=b"L") * 2 + SAMPLE,
    "a thousand extended headers": pax({"path": b"a.x0.npy"}) * 1000 + SAMPLE,
    "an extended header of 200 KiB": pax({"comment": b"x" * 200_000}) + SAMPLE,
    "an extended size past the end": pax({"size": b"99999999999999999999"}) + SAMPLE,
    "an extended size below zero": pax({"size": b"-1"}) + SAMPLE,
    "records that are none": member(b"pax", b"12345678901 path=x\n", kind=b"x") + SAMPLE,
    "a record of no length": member(b"pax", b"0 path=x\n", kind=b"x") + SAMPLE,
    "one name for all": pax({"path": b"a.x0.npy"}, kind=b"g") + SAMPLE,
    "no name": member(b"", VALUES),
    "an unknown kind": member(b"k.x0.npy", VALUES, kind=b"Q"),
    "a folder with content": member(b"d/", b"x", kind=b"5") + SAMPLE,
    "a symbolic link with content": member(b"d", b"x", kind=b"2") + SAMPLE,
    "half a header": SAMPLE + header(b"l.x0.npy", 5)[:300],
}


@pytest.mark.parametrize("liar", LIARS)
@pytest.mark.parametrize("end", [END, b""])
def test_headers_are_not_believed(tmp_path, liar, end):
    path = write(tmp_path / "a.tar", LIARS[liar] + end)
    tracemalloc.start()
    try:
        refusal(path)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_headers_for_all_members_are_passed_over(tmp_path):
    """`git archive` writes one, with its commit."""
    path = write(tmp_path / "a.tar", pax({"comment": b"0123456789"}, kind=b"g") * 3000 + GOOD + END)
    [row] = scan_shard(path)
    assert path.read_bytes()[row["x0_offset"] :][: row["x0_length"]] == latents(0).tobytes()


@pytest.mark.parametrize(
    ("name", "said"), [("a\nb", "a\\nb"), ("\x1b[31m", "\\x1b[31m"), ("\udcff", "\\udcff"), ("x" * 80, "x" * 80)]
)
def test_a_name_is_shown_in_one_line(tmp_path, name, said):
    content = member(name.encode("utf-8", "surrogateescape") + b".x0.npy", b"x") + END
    assert said in refusal(write(tmp_path / "a.tar", content))


def test_a_name_of_100_000_characters_is_shortened(tmp_path):
    write(tmp_path / "a.tar", pax({"path": b"k" * 100_000 + b".x0.npy"}) + member(b"k", b"x") + END)
    assert "kkk.x0.npy is not a .npy array" in refusal(tmp_path / "a.tar")


def test_other_files_are_not_tars(tmp_path):
    assert "is compressed" in refusal(write(tmp_path / "a.tar", gzip.compress(GOOD + END)))
    assert "header at byte 0 is damaged" in refusal(write(tmp_path / "a.tar", b"RIFF" * 500))
    assert "end-of-archive marker is missing" in refusal(write(tmp_path / "a.tar", b""))
    os.mkfifo(tmp_path / "b.tar")
    assert refusal(tmp_path / "b.tar") == "is not a regular file"
    (tmp_path / "c.tar").mkdir()
    assert refusal(tmp_path / "c.tar") == "is not a regular file"


def test_a_member_that_no_index_can_hold(tmp_path):
    size = 2**32 + 512
    with (tmp_path / "a.tar").open("wb") as file:  # the file is a hole, but for its ends
        file.write(header(b"k.x0.npy", b"\x80\0\0\0" + size.to_bytes(8)) + npy_with_header("x"))
        file.truncate(512 + size + len(END))
    assert find_tar_members(tmp_path / "a.tar") == [("k.x0.npy", 512, size, "")]
    assert refusal(tmp_path / "a.tar").startswith(f"k.x0.npy has {size} bytes, but the index can hold 4294967295")


METADATA = {
    '["rain"]': "k.json is a list, but metadata must be an object",
    '"rain"': "k.json is a text, but",
    "null": "k.json is null, but",
    "true": "k.json is true or false, but",
    "3": "k.json is a number, but",
    "": "k.json is not JSON: ",
    "{": "k.json is not JSON: ",
    "[" * 100_000: "k.json is not JSON: ",
    '{"n": ' + "9" * 5000 + "}": "k.json is not JSON: ",
    " " * (17 << 20): "k.json has 17825792 bytes, but metadata may have",
}


@pytest.mark.parametrize("number", range(len(METADATA)))
def test_metadata_that_is_no_object_is_named(tmp_path, number, capsys):
    content, said = list(METADATA.items())[number]
    path = write(tmp_path / "0.tar", SAMPLE + member(b"k.json", content.encode()) + END)
    assert refusal(path).startswith(said)
    assert main(["index", str(tmp_path), "--autoencoder", "spectral", "--workers", "1"]) == 2
    assert f"{path}: {said}" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b'["rain"]', b"null", b'"rain drops"', b"\xff\xfe{}"])
def test_metadata_of_an_older_index_is_named(tmp_path, content, capsys):
    """`spresso index` of earlier releases did not read the metadata."""
    write(tmp_path / "0.tar", SAMPLE + member(b"k.json", b"{}".ljust(len(content))) + END)
    index_folder(tmp_path, INFO)
    shard_set = as_version_2(tmp_path)
    offset = int(shard_set.index["json_offset"][0])
    tar = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(tar[:offset] + content + tar[offset + len(content) :])
    with pytest.raises(DamagedSample, match=f"{tmp_path}/0.tar is damaged at byte {offset}: k.json is "):
        shard_set.metadata(0)
    assert main(["data", str(tmp_path)]) == 2
    assert "k.json is " in capsys.readouterr().err
    assert verify_folder(tmp_path)[0].startswith(f"{tmp_path}/0.tar: k.json is ")


@pytest.mark.parametrize(("column", "value"), [("json_length", 2**32 - 1), ("json_offset", 2**63), ("shard", 7)])
def test_a_damaged_row_does_not_ask_for_more_than_the_shard(tmp_path, column, value):
    write(tmp_path / "0.tar", GOOD + END)
    index_folder(tmp_path, INFO)
    index = np.load(tmp_path / "index.npy")
    index[column][0] = value
    np.save(tmp_path / "index.npy", index)
    with pytest.raises(DamagedSample, match=r"index\.npy is damaged"):
        ShardSet(tmp_path, verify=False).metadata(0)


def test_audio_that_is_no_sound_is_named(tmp_path):
    write(tmp_path / "0.tar", SAMPLE + member(b"k.flac", b"no sound") + END)
    shard_set = index_folder(tmp_path, INFO)
    with pytest.raises(DamagedSample, match=r"0\.tar is damaged at byte \d+: its audio can't be decoded"):
        shard_set.audio(0)


@pytest.mark.parametrize("content", [b"[]", b"3", b"null", b'{"version": 2}', b'{"version": 2, "shards": 3}'])
def test_a_description_that_is_none(tmp_path, content):
    write(tmp_path / "0.tar", GOOD + END)
    index_folder(tmp_path, INFO)
    (tmp_path / "set.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"set\.json is damaged"):
        ShardSet(tmp_path)


@pytest.mark.parametrize("text", ["(" * 50, "{[]: 1}", "{'descr': '''", "-" * 3000 + "1"])
def test_an_index_whose_header_is_none(tmp_path, text):
    write(tmp_path / "0.tar", GOOD + END)
    index_folder(tmp_path, INFO)
    (tmp_path / "index.npy").write_bytes(npy_with_header(text))
    with pytest.raises(ValueError, match=r"the index of .* is damaged"):
        ShardSet(tmp_path)
