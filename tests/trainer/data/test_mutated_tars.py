"""Tars and .npy headers changed at random: each is read right or refused in one line, and nothing else happens."""

from __future__ import annotations

import io
import random
import tarfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.mutant_counts import MutantCounts
from tests.trainer.data.raw_tars import BLOCK, END, latents, member, npy, npy_with_header, pax, with_checksum
from trainer.data.index_row import parse_metadata
from trainer.data.shards import find_members, index_rows

MOST_SECONDS, MOST_BYTES = 5, 64 << 20
SAMPLES = 5


def packed(form: int) -> bytes:
    """Return a tar of Python's with short and long names, a folder and links."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        folder = tarfile.TarInfo("d")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for number in range(SAMPLES):
            key = f"d/{'long' * (30 if number == 3 and form != tarfile.USTAR_FORMAT else 1)}{number}"
            for kind, content in (("x0.npy", npy(latents(number))), ("json", b'{"n": %d}' % number)):
                info = tarfile.TarInfo(f"{key}.{kind}")
                info.size = len(content)
                if kind == "json" and number in (1, 2):
                    info.type, info.size = (tarfile.LNKTYPE if number == 1 else tarfile.SYMTYPE), 0
                    info.linkname = "d/long0.json" if number == 1 else "long0.json"
                tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


TARS = [packed(form) for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)]


def a_block(rng: random.Random, tar: bytearray) -> int:
    return BLOCK * rng.randrange(len(tar) // BLOCK)


def a_header(rng: random.Random, tar: bytearray) -> int:
    return rng.choice([at for at in range(0, len(tar), BLOCK) if tar[at + 257 : at + 262] == b"ustar"])


def bits(rng: random.Random, tar: bytearray) -> None:
    for _ in range(rng.choice((1, 1, 1, 2, 20))):
        tar[rng.randrange(len(tar))] ^= 1 << rng.randrange(8)


def bits_of_a_header(rng: random.Random, tar: bytearray) -> None:
    tar[a_header(rng, tar) + rng.randrange(BLOCK)] ^= 1 << rng.randrange(8)


def field(rng: random.Random, tar: bytearray) -> None:
    """Change a field of a header, and make its checksum right."""
    at = a_header(rng, tar)
    fields = [(0, 100), (124, 136), (124, 136), (156, 157), (156, 157), (157, 257)]
    # Python's reader takes a prefix from GNU's headers, too, which have other fields in its place.
    fields += [(345, 500)] if tar[at + 257 : at + 263] == b"ustar\0" else []
    start, end = rng.choice(fields)
    number = rng.choice((0, 1, 511, 512, 513, 1 << 20, 1 << 33, rng.randrange(1 << 33)))
    values = [
        b"%0*o\0" % (end - start - 1, number),
        rng.randbytes(end - start),
        b"\x80" + number.to_bytes(11),
        bytes(155),
    ]
    kinds = [bytes([kind]) for kind in b"01234567LKxgXSMDVAN\0"]
    value = rng.choice(kinds if end - start == 1 else values)[: end - start]
    tar[at + start : at + end] = value.ljust(end - start, b"\0")
    tar[at : at + BLOCK] = with_checksum(bytes(tar[at : at + BLOCK]))


def cut(rng: random.Random, tar: bytearray) -> None:
    del tar[rng.choice((a_block(rng, tar), rng.randrange(len(tar)))) :]


def drop(rng: random.Random, tar: bytearray) -> None:
    at = a_block(rng, tar)
    del tar[at : at + BLOCK * rng.randrange(1, 8)]


def insert(rng: random.Random, tar: bytearray) -> None:
    junk = [bytes(BLOCK), END, rng.randbytes(BLOCK), rng.randbytes(100), rng.choice(TARS), bytes(tar[:3000])]
    at = rng.choice((a_block(rng, tar), len(tar)))
    tar[at:at] = rng.choice(junk)


def insert_headers(rng: random.Random, tar: bytearray) -> None:
    at, size = a_header(rng, tar), rng.choice((b"4", b"-1", b"1e3", b"5000", b"99999999999999999999"))
    key = rng.choice(("path", "linkpath", "size", "comment", "GNU.sparse.name", "GNU.sparse.major", "GNU.volume.size"))
    records = pax({key: rng.choice((size, b"other.x0.npy", rng.randbytes(20)))}, kind=rng.choice((b"x", b"g", b"X")))
    junk = member(b"pax", rng.randbytes(rng.randrange(60)), kind=rng.choice((b"x", b"g", b"L", b"K")))
    tar[at:at] = rng.choice((records, records, junk)) * rng.choice((1, 1, 1, 2, 100))  # Python's reader recurses


def swap(rng: random.Random, tar: bytearray) -> None:
    one, two = a_block(rng, tar), a_block(rng, tar)
    tar[one : one + BLOCK], tar[two : two + BLOCK] = tar[two : two + BLOCK], tar[one : one + BLOCK]


def add_odd_members(rng: random.Random, tar: bytearray) -> None:
    name = rng.choice(
        (b"d/long0.x0.npy", b"./d/long1.json", b"d/._long1.x0.npy", b"n.x0.npy", b"n.txt", b".DS_Store", b"n")
    )
    content = rng.choice((b"", npy(latents(7)), b"{}", b"[1]", b"\x00\x05\x16\x07" + bytes(50), rng.randbytes(40)))
    link = rng.choice((b"d/long0.x0.npy", b"long0.x0.npy", b"/etc/hostname", name, b""))
    odd = member(
        name, rng.choice((b"", content)), kind=rng.choice((b"0", b"0", b"\0", b"1", b"2", b"5", b"6")), link=link
    )
    at = a_header(rng, tar)
    tar[at:at] = odd


MUTATIONS: list[Callable[[random.Random, bytearray], None]] = [
    bits, bits_of_a_header, field, field, cut, drop, insert, insert_headers, swap, add_odd_members,
]  # fmt: skip


def values_by_tarfile(content: bytes) -> dict[str, bytes]:
    """Return the content of each file and link, by Python's reader."""
    found = {}
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        for info in tar.getmembers():
            if info.isfile() or info.islnk() or info.issym():
                try:
                    found[info.name] = tar.extractfile(info).read()
                except (KeyError, RecursionError):  # a link to what the tar lacks, or to itself
                    found[info.name] = b""
    return found


def check(path: Path, content: bytes) -> bool:
    """Read a tar; returns whether it was accepted."""
    path.write_bytes(content)
    samples, rows, said = None, None, None
    try:
        samples = find_members(path)
        rows = index_rows(path, samples)
    except ValueError as error:
        said = str(error)
    if samples is None or rows is None:
        assert said is not None
        assert said.startswith(str(path))
        assert said.isprintable()
        assert len(said) < 2000
        return False
    theirs = values_by_tarfile(content)
    latents_of = {name for name in theirs if name.lower().endswith(".x0.npy") and "._" not in name}
    assert len(rows) == len(latents_of)
    by_name = {name.removeprefix("./").lstrip("/").lower(): value for name, value in theirs.items()}
    for row, (key, members) in zip(rows, samples.items(), strict=True):
        for kind, (offset, length) in members.items():
            assert content[offset : offset + length] == by_name[f"{key}.{kind}".lower()]
        x0 = np.frombuffer(content[row["x0_offset"] : row["x0_offset"] + row["x0_length"]], np.float16)
        stored = np.load(io.BytesIO(by_name[f"{key}.x0.npy".lower()]))
        np.testing.assert_array_equal(x0.reshape(-1, row["frames"]), stored)
        if row["json_length"]:
            parse_metadata(content[row["json_offset"] : row["json_offset"] + row["json_length"]])
    return True


def fuzz_tars(path: Path, seed: int, count: int, counts: MutantCounts) -> None:
    rng, accepted = random.Random(seed), 0
    for number in range(count):
        tar = bytearray(rng.choice(TARS))
        mutation = MUTATIONS[number % len(MUTATIONS)]
        mutation(rng, tar)
        start = time.monotonic()
        counts.begin("tars")
        right = check(path, bytes(tar))
        counts.end("tars", refused=not right)
        accepted += right
        assert time.monotonic() - start < MOST_SECONDS, (number, mutation)
    assert count / 20 < accepted < count / 2


def mutated_header(rng: random.Random) -> str:
    parts = [
        "'descr'",
        "'<f2'",
        "'fortran_order'",
        "False",
        "'shape'",
        "(128, 9)",
        "True",
        "'>f2'",
        "(-128, -9)",
        "(0, 9)",
    ]
    parts += [
        "(128, 0)",
        "(9,)",
        "{",
        "}",
        "[]",
        "{[]: 1}",
        "(" * 300,
        "'",
        "'''",
        "\\",
        "\n",
        "128L",
        "1e9",
        "#",
        "\0",
        "ü",
    ]
    text = "{'descr': '<f2', 'fortran_order': False, 'shape': (128, 9), }"
    for _ in range(rng.choice((0, 1, 1, 1, 2, 5))):
        at = rng.randrange(len(text))
        new = rng.choice((rng.choice(parts), chr(rng.randrange(256)), " ", ""))
        if rng.random() < 0.4:
            old = rng.choice([part for part in parts[:6] if part in text] or [text])
            text = text.replace(old, new, 1) or " "
        else:
            text = text[:at] + new + text[at + rng.randrange(3) :]
    return text


def fuzz_headers(path: Path, seed: int, count: int, counts: MutantCounts) -> None:
    rng, accepted = random.Random(seed), 0
    for _ in range(count):
        content = npy_with_header(mutated_header(rng), rng.choice((*[latents(0).tobytes()] * 3, b"", bytes(7))))
        counts.begin("headers of arrays in tars")
        right = check(path, member(b"k.x0.npy", content) + END)
        counts.end("headers of arrays in tars", refused=not right)
        accepted += right
    assert count / 50 < accepted < count / 2


def test_what_is_not_mutated_is_accepted(tmp_path):
    for content in TARS:
        assert check(tmp_path / "a.tar", content)
        samples = find_members(tmp_path / "a.tar")
        assert [members.keys() for members in samples.values()] == [{"x0.npy", "json"}] * SAMPLES
        for row, number in zip(index_rows(tmp_path / "a.tar", samples), range(SAMPLES), strict=True):
            values = content[row["x0_offset"] : row["x0_offset"] + row["x0_length"]]
            assert values == latents(number).tobytes()


def test_mutated_tars(tmp_path, mutant_counts):
    fuzz_tars(tmp_path / "a.tar", seed=0, count=100, counts=mutant_counts)


def test_mutated_headers(tmp_path, mutant_counts):
    fuzz_headers(tmp_path / "a.tar", seed=0, count=100, counts=mutant_counts)


@pytest.mark.slow
def test_many_mutated_tars_and_headers(tmp_path, mutant_counts):
    tracemalloc.start()
    try:
        for seed in range(1, 9):
            fuzz_tars(tmp_path / "a.tar", seed=seed, count=500, counts=mutant_counts)
            fuzz_headers(tmp_path / "a.tar", seed=seed, count=500, counts=mutant_counts)
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    finally:
        tracemalloc.stop()
