"""Writes the sounds of a folder as other people keep theirs: in tars, and in tables as `datasets` 5.2.0 writes them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

AUDIO = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def captions_of(folder: Path) -> dict[str, str | None]:
    """Name of each sound → its caption, sorted."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.wav"))
    texts = ((folder / name).with_suffix(".txt") for name in names)
    return {name: text.read_text() if text.exists() else None for name, text in zip(names, texts, strict=True)}


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def members_of(folder: Path) -> list[tuple[str, bytes]]:
    """The files of a folder by their names, a caption after its sound."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(path.relative_to(folder).as_posix(), path.read_bytes()) for path in paths]


def row_of(folder: Path, name: str, caption: str | None) -> dict[str, Any]:
    return {"audio": {"bytes": (folder / name).read_bytes(), "path": name}, "text": caption}


def table_of(rows: list[dict[str, Any]], **types: Any) -> pa.Table:
    """A table with the metadata that `datasets` writes."""
    types = {"audio": AUDIO, "text": pa.string(), **types}
    kinds = {
        name: {"decode": False, "_type": "Audio"} if kind is AUDIO else {"dtype": "string", "_type": "Value"}
        for name, kind in types.items()
    }
    metadata = {"huggingface": json.dumps({"info": {"features": kinds}})}
    return pa.Table.from_pylist(rows, pa.schema(types.items(), metadata=metadata))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [row_of(folder, name, caption) for name, caption in captions_of(folder).items()]


def write_parquet(path: Path, table: pa.Table, *, rows: int = 3, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=rows, **options)
    return path


def write_arrow(path: Path, table: pa.Table, *, stream: bool = True, rows: int = 3, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    make = pa.ipc.new_stream if stream else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as file, make(file, table.schema, **options) as writer:
        writer.write_table(table, max_chunksize=rows)
    return path


def save_to_disk(folder: Path, table: pa.Table, *, shards: int = 2) -> Path:
    """What `Dataset.save_to_disk` leaves, with an intermediate result of `Dataset.map` beside it."""
    size = -(-len(table) // shards)
    names = [f"data-{number:05d}-of-{shards:05d}.arrow" for number in range(shards)]
    for number, name in enumerate(names):
        write_arrow(folder / name, table.slice(number * size, size))
    write_arrow(folder / "cache-0123456789abcdef.arrow", table.slice(0, 2))
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0bb94ec4b070190c"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def halves(folder: Path) -> tuple[list[tuple[str, bytes]], list[tuple[str, bytes]]]:
    """The members of a folder for two tars, each sound in the same one as its caption."""
    members = members_of(folder)
    middle = members[len(members) // 2][0].partition(".")[0]
    before = [member for member in members if member[0].partition(".")[0] < middle]
    return before, members[len(before) :]


def as_tars(folder: Path, out: Path) -> Path:
    for number, part in enumerate(halves(folder)):
        write_tar(out / f"shard-{number:03d}.tar", part)
    return out


SOURCES: dict[str, Callable[[Path, Path], Path | str]] = {
    "manifest": lambda folder, out: _manifest(folder),
    "tar": lambda folder, out: write_tar(out / "all.tar", members_of(folder)),
    "folder of tars": as_tars,
    "braces": lambda folder, out: f"{as_tars(folder, out)}/shard-{{000..001}}.tar",
    "parquet": lambda folder, out: write_parquet(out / "a.parquet", table_of(rows_of(folder))),
    "plain parquet": lambda folder, out: write_parquet(
        out / "a.parquet", table_of(rows_of(folder)).replace_schema_metadata(None), compression="zstd"
    ),
    "folder of parquet": lambda folder, out: _parquets(folder, out),
    "stream": lambda folder, out: write_arrow(out / "a.arrow", table_of(rows_of(folder))),
    "file": lambda folder, out: write_arrow(out / "a.arrow", table_of(rows_of(folder)), stream=False),
    "save_to_disk": lambda folder, out: save_to_disk(out / "saved", table_of(rows_of(folder))),
    "paths": lambda folder, out: write_arrow(folder / "paths.arrow", _paths(folder)),
}
"""Kind of source → what writes the sounds of a folder so, and returns what `data.audio` has to be."""


def _manifest(folder: Path) -> Path:
    lines = [json.dumps({"file": name}) for name in captions_of(folder)]
    (folder / "m.jsonl").write_text("\n".join(lines))
    return folder / "m.jsonl"


def _parquets(folder: Path, out: Path) -> Path:
    table = table_of(rows_of(folder))
    write_parquet(out / "data/part-00000-of-00002.parquet", table.slice(0, 7))
    write_parquet(out / "data/part-00001-of-00002.parquet", table.slice(7))
    return out


def _paths(folder: Path) -> pa.Table:
    rows = [{"audio": {"bytes": None, "path": name}, "text": text} for name, text in captions_of(folder).items()]
    return table_of(rows)
