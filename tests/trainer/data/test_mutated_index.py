"""An index, a `set.json` or a shard changed at random: an error of one line, or each row is the sample that it was."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.damage import BYTES, VALUE, watched
from tests.mutant_counts import MutantCounts
from trainer.data.audio import encode_audio
from trainer.data.shard_set import ShardSet
from trainer.data.shards import SetInfo, ShardWriter, scan_shard, write_index

CHANNELS, SAMPLES, TOKENS, WIDTH = 4, 12, 3, 2
INFO = SetInfo("abc123", {"kind": "fake"}, 8000, 80, CHANNELS, 0.1, {}, {"encoder": "e", "tokens": 9, "width": WIDTH})
KIND, SHARDS = "indexes and set.json", "shards of a set"
Rows = list[tuple[bytes, ...]]


def write_set(folder: Path) -> None:
    """Write a set of shards of equal size. Each second sample has the same number of frames."""
    with ShardWriter(folder, max_bytes=25_000) as writer:
        for number in range(SAMPLES):
            chance = np.random.default_rng(number)
            writer.write(
                f"s{number:02d}",
                chance.standard_normal((CHANNELS, 9 + number % 2)).astype(np.float16),
                {"caption": f"sample {number:02d}"},
                flac=encode_audio(chance.uniform(-0.5, 0.5, (1, 800)).astype(np.float32), 8000, suffix=".flac"),
                text_NE=chance.standard_normal((TOKENS, WIDTH)).astype(np.float16),
            )
    write_index(folder, INFO, {name: scan_shard(folder / name) for name in writer.names})


def rows_of(shard_set: ShardSet) -> Rows:
    """Read all that a set holds: latents at once and one by one, texts, metadata and audio."""
    together = shard_set.latents(range(len(shard_set)))
    # as training does: rows as long as set.json says the longest is
    out = np.empty((len(shard_set), CHANNELS * shard_set.longest_frames), np.float16)
    for problem in shard_set.read(np.arange(len(shard_set)), out).values():
        raise problem
    return [
        (
            x0.tobytes(),
            out[id_, : x0.size].tobytes(),
            shard_set.text(id_).tobytes(),
            json.dumps(shard_set.metadata(id_)).encode(),
            shard_set.audio(id_).tobytes(),
        )
        for id_, x0 in enumerate(together)
    ]


# --- mutations of index.npy -------------------------------------------------------------------------------------------


def header_of(content: bytearray) -> int:
    return 10 + int.from_bytes(content[8:10], "little")


def change_bytes(chance: random.Random, content: bytearray) -> None:
    for _ in range(chance.choice((1, 1, 1, 2, 20))):
        content[chance.randrange(len(content))] = chance.choice((0, 255, chance.randrange(256)))


def change_the_header(chance: random.Random, content: bytearray) -> None:
    content[chance.randrange(header_of(content))] = chance.choice((*b"0123456789 '<>u()", chance.randrange(256)))


def rename_a_column(chance: random.Random, content: bytearray) -> None:
    start = header_of(content)
    names = [b"shard", b"frames", b"x0_offset", b"x0_length", b"json_offset", b"flac_offset", b"text_offset", b"<u4"]
    old, new = chance.sample(names, 2)
    content[:start] = bytes(content[:start]).replace(old, b"?").replace(new, old).replace(b"?", new)[:start]


def cut(chance: random.Random, content: bytearray) -> None:
    first, last = sorted(chance.randrange(len(content)) for _ in range(2))
    if chance.random() < 0.5:
        del content[last:]
    else:
        del content[first:last]


def put_in(chance: random.Random, content: bytearray) -> None:
    place = chance.choice((len(content), chance.randrange(len(content))))
    content[place:place] = chance.choice((bytes(8), chance.randbytes(92), content[-92:], content[:200]))


def change_rows(chance: random.Random, content: bytearray) -> None:
    """Exchange, copy or change whole numbers: each row alone still looks right."""
    index = np.load(io.BytesIO(content))
    one, two = chance.sample(range(len(index)), 2)
    column = chance.choice([*index.dtype.names, *[name for name in index.dtype.names if "offset" in name]])
    prefix = chance.choice(("x0", "json", "flac", "text"))
    members = [name for name in index.dtype.names if name.startswith(prefix)]
    way = chance.randrange(7)
    if way == 0:
        index[[one, two]] = index[[two, one]]
    elif way == 1:
        index[column][[one, two]] = index[column][[two, one]]
    elif way == 2:
        for name in members:
            index[name][[one, two]] = index[name][[two, one]]
    elif way == 3:
        index[one] = index[two]
    elif way == 4:
        index = index[chance.sample(range(len(index)), chance.choice((len(index), len(index) - 1)))]
    elif way == 5:
        index[column][one] = chance.choice((0, 1, 7, 2**31, 2**32 - 1, index[column][two]))
    else:
        index["shard"] = np.roll(index["shard"], 1)
    file = io.BytesIO()
    np.save(file, index)
    content[:] = file.getvalue()


OF_INDEX: list[Callable[[random.Random, bytearray], None]] = [
    change_bytes, change_bytes, change_the_header, rename_a_column, cut, put_in, change_rows, change_rows, change_rows,
]  # fmt: skip


def mutated_description(content: bytes, chance: random.Random) -> bytes:
    """Return a `set.json` with its bytes or values changed, or with what it says of two shards exchanged."""
    way = chance.randrange(5)
    if way == 0:
        return BYTES[chance.choice([name for name in BYTES if name not in ("too large", "a long text")])](
            content, chance
        )
    description: Any = json.loads(content)
    if way in (1, 2):
        return json.dumps(VALUE[chance.choice([*VALUE])](description, chance)).encode()
    shards = description["shards"]
    one, two = chance.sample(range(len(shards)), 2)
    if way == 3:
        key = chance.choice(("name", "bytes"))
        shards[one][key], shards[two][key] = shards[two][key], shards[one][key]
    else:
        number = chance.choice([name for name in description if isinstance(description[name], int)])
        description[number] += chance.choice((-1, 1, 7, -description[number], 2**40))
    return json.dumps(description).encode()


# --- what is expected -------------------------------------------------------------------------------------------------


def fuzz(folder: Path, seeds: range, counts: MutantCounts, *, older: bool = False) -> None:
    """Read mutants of a set. `older`: of one without a checksum, in which exchanged audio is not seen."""
    write_set(folder)
    files = {name: (folder / name).read_bytes() for name in ("index.npy", "set.json")}
    if older:
        description = json.loads(files["set.json"])
        del description["checksum"]
        files["set.json"] = json.dumps(description).encode()
        (folder / "set.json").write_bytes(files["set.json"])
    expected = rows_of(ShardSet(folder))
    assert len({row[0] for row in expected}) == SAMPLES
    kind = f"{KIND}, without checksum" if older else KIND
    for seed in seeds:
        chance = random.Random(seed)
        name = chance.choice(("index.npy", "index.npy", "set.json"))
        content = bytearray(files[name])
        if name == "index.npy":
            chance.choice(OF_INDEX)(chance, content)
        else:
            content[:] = mutated_description(files[name], chance)
        (folder / name).write_bytes(content)
        counts.begin(kind)
        counts.end(kind, refused=is_refused(folder, expected, seed, older=older))
        (folder / name).write_bytes(files[name])


def is_refused(folder: Path, expected: Rows, seed: int, *, older: bool) -> bool:
    try:
        with watched():
            shard_set = ShardSet(folder)
            rows = rows_of(shard_set)
    except ValueError as error:
        said = str(error)
        assert str(folder) in said, (seed, said)
        assert said.isprintable(), (seed, said)
        assert len(said) < 2000, (seed, said)
        return True
    seen = slice(4) if older else slice(None)
    assert [row[seen] for row in rows] == [row[seen] for row in expected], f"{seed}: read, but wrong"
    if not older:
        free = {"ae_identity": "", "ae_options": {}, "prepared": {}}  # compared with what a run asks for
        assert replace(shard_set.info, **free) == replace(INFO, **free), seed
    return False


def test_a_hundred_mutated_indexes(tmp_path, mutant_counts):
    fuzz(tmp_path / "set", range(100), mutant_counts)
    assert mutant_counts.kinds[KIND]["refused"] > 60
    assert mutant_counts.kinds[KIND]["right"] > 0


def test_mutated_indexes_of_older_sets(tmp_path, mutant_counts):
    fuzz(tmp_path / "set", range(100), mutant_counts, older=True)


# --- shards under an index that is whole ------------------------------------------------------------------------------


def damaged_shard(chance: random.Random, content: bytes, metadata: list[slice]) -> bytes:
    """Return a shard with bits flipped, mostly in its `metadata`, with a zeroed piece, or with pieces exchanged."""
    damaged = bytearray(content)
    one, two = (4096 * chance.randrange(len(content) // 4096) for _ in range(2))
    where, way = chance.choice(metadata), chance.randrange(5)
    if way < 2:
        damaged[chance.randrange(where.start, where.stop)] ^= 1 << chance.randrange(8)
    elif way == 2:
        damaged[chance.randrange(where.start, where.stop)] = chance.choice(b"0123456789 ")
    elif way == 3:
        damaged[one : one + 4096] = bytes(4096)
    else:
        damaged[one : one + 4096], damaged[two : two + 4096] = damaged[two : two + 4096], damaged[one : one + 4096]
    return bytes(damaged)


def fuzz_shards(folder: Path, seeds: range, counts: MutantCounts) -> None:
    write_set(folder)
    shard_set = ShardSet(folder)
    expected = rows_of(shard_set)
    for seed in seeds:
        chance = random.Random(seed)
        number = chance.randrange(len(shard_set.shards))
        path = shard_set.paths[number]
        content = path.read_bytes()
        rows = [row for row in shard_set.index if row["shard"] == number]
        places = [slice(int(row["json_offset"]), int(row["json_offset"] + row["json_length"])) for row in rows]
        path.write_bytes(damaged_shard(chance, content, places))
        counts.begin(SHARDS)
        counts.end(SHARDS, refused=is_refused(folder, expected, seed, older=False))
        path.write_bytes(content)


def test_mutated_shards(tmp_path, mutant_counts):
    fuzz_shards(tmp_path / "set", range(100), mutant_counts)
    assert mutant_counts.kinds[SHARDS]["refused"] > 60
    assert mutant_counts.kinds[SHARDS]["right"] > 0


@pytest.mark.slow
def test_thousands_of_mutated_shards(tmp_path, mutant_counts):
    fuzz_shards(tmp_path / "set", range(100, 3100), mutant_counts)


@pytest.mark.slow
@pytest.mark.parametrize("older", [False, True])
def test_thousands_of_mutated_indexes(tmp_path, mutant_counts, older):
    fuzz(tmp_path / "set", range(100, 3100), mutant_counts, older=older)
