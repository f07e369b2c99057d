"""Reads the sounds of Parquet and Arrow files, as the `datasets` package of Hugging Face writes them, by pyarrow alone.

A column of sounds is a struct of `bytes` and `path`. In an Arrow file a sound's bytes lie in one piece, so that its
place is recorded and pyarrow is not needed again. In a Parquet file they are compressed with those of their row group,
which is read from its beginning, some rows at a time: memory holds a page and a few rows. (pyarrow ends a page after
1,024 rows, so that its own files may have row groups of one page.)
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from trainer.data.arrow_places import ArrowFile, explained
from trainer.data.bucket import SourceError, SourceFile
from trainer.data.captions import captions_of
from trainer.data.lazy_file import LazyFile
from trainer.data.origins import InMemory, Lost, Origin, Section, TableCell, local_file, require_same
from trainer.data.remote import is_url
from trainer.data.sound_trees import Listed
from trainer.data.sources import SoundFile
from trainer.file_names import as_unicode, printable

CAPTION_COLUMNS = ("caption", "captions", "text", "description", "prompt")
"""Columns that hold captions, the first of which is used."""
_ROWS, _CELLS = 1024, 4  # rows that are read at once: of text, and of sounds
_BUFFER = 1 << 20
_LARGEST_FOOTER, _MOST_PARTS = 256 << 20, 1_000_000
"""Bytes of a text, and entries of a list, that a footer may ask for, which damage could make absurd."""


@dataclass(frozen=True)
class Columns:
    """Which columns of a table are used."""

    audio: str
    has_bytes: bool
    has_path: bool
    caption: str | None
    facts: list[str]

    @property
    def wanted(self) -> list[str]:
        """The columns that are read to list the sounds, as Parquet names them."""
        path = [f"{self.audio}.path"] if self.has_path and self.has_bytes else [self.audio] if self.has_path else []
        return [*path, *([self.caption] if self.caption else []), *self.facts]


def require_pyarrow() -> Any:
    """Return pyarrow; raises ValueError if it is not installed."""
    try:
        import pyarrow  # imported here because it is slow, and only tables need it
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(
            f"Parquet and Arrow files need pyarrow ({error}): pip install 'spresso[datasets]', or pip install pyarrow"
        ) from error
    return pyarrow


def choose_columns(schema: Any, where: str, audio: str | None, caption: str | None) -> Columns:
    """Return the columns of a table with a pyarrow schema.

    Raises:
        ValueError: none or several columns hold sounds, or a column that the recipe names is missing.
    """
    pa = require_pyarrow()
    for key, name in (("audio_column", audio), ("caption_column", caption)):
        if name is not None and name not in schema.names:
            raise ValueError(
                f"{where} has no column {printable(name)}: set data.{key} to one of {', '.join(schema.names)}"
            )
    known = [field.name for field in schema if _holds_sounds(pa, schema, field)]
    if audio is None and len(known) != 1:
        what = f"several columns of sounds ({', '.join(known)})" if known else "no column of sounds"
        raise ValueError(f"{where} has {what}: set data.audio_column to one of {', '.join(known or schema.names)}")
    chosen = schema.field(audio or known[0])
    parts = (
        [chosen.type.field(n).name for n in range(chosen.type.num_fields)] if pa.types.is_struct(chosen.type) else []
    )
    held = chosen.type.field("bytes").type if "bytes" in parts else pa.binary()
    is_text = pa.types.is_string(chosen.type) or pa.types.is_large_string(chosen.type)
    is_sound = bool({"bytes", "path"} & {*parts}) or is_text or _is_binary(pa, chosen.type)
    if not is_sound or not (_is_binary(pa, held) or pa.types.is_null(held)):
        raise ValueError(
            f"{where}: the column {chosen.name} holds {chosen.type}, neither files of sound nor their paths"
        )
    texts = caption or next((name for name in CAPTION_COLUMNS if name in schema.names and name != chosen.name), None)
    facts = [field.name for field in schema if field.name not in (chosen.name, texts) and _is_scalar(pa, field.type)]
    if twice := next((name for name in (chosen.name, texts, *facts) if schema.names.count(name) > 1), None):
        raise ValueError(f"{where} has several columns {printable(twice)}: write the table with a name for each")
    return Columns(
        chosen.name, "bytes" in parts or _is_binary(pa, chosen.type), "path" in parts or is_text, texts, facts
    )


def _holds_sounds(pa: Any, schema: Any, field: Any) -> bool:
    """Whether a column holds sounds: `datasets` says so in the metadata, else its type does."""
    try:
        said = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        kinds = {name: feature.get("_type") for name, feature in said.items() if isinstance(feature, dict)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        kinds = {}
    if "Audio" in kinds.values():
        return kinds.get(field.name) == "Audio"
    if field.name in kinds:
        return False  # such as Image, whose storage is the same
    return pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0


def _is_binary(pa: Any, kind: Any) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_scalar(pa: Any, kind: Any) -> bool:
    types = pa.types
    return any(
        is_it(kind) for is_it in (types.is_string, types.is_large_string, types.is_integer, types.is_boolean)
    ) or (types.is_floating(kind))


class ParquetRows:
    """An open Parquet file, on this machine or on a server. Errors name the file.

    Raises:
        ValueError: the file is damaged, or is no Parquet file.
    """

    def __init__(self, stored: SourceFile, patience: float) -> None:
        self._pa, self.stored = require_pyarrow(), stored
        with self.damage():
            self.file = self._pa.parquet.ParquetFile(
                self._pa.PythonFile(LazyFile(stored, patience), mode="r"),
                buffer_size=_BUFFER,
                pre_buffer=False,
                thrift_string_size_limit=_LARGEST_FOOTER,
                thrift_container_size_limit=_MOST_PARTS,
            )
            self.schema = self.file.schema_arrow
            count = range(self.file.num_row_groups)
            self.groups: list[int] = [self.file.metadata.row_group(group).num_rows for group in count]
            """The number of rows in each row group."""
            if sum(self.groups) > stored.size:
                raise ValueError(f"it claims {sum(self.groups)} rows in {stored.size} bytes")

    def batches(self, group: int, columns: list[str], size: int) -> Iterator[Any]:
        """Yield batches of at most `size` rows of a row group."""
        with self.damage():
            yield from self.file.iter_batches(size, row_groups=[group], columns=columns, use_threads=False)

    @contextmanager
    def damage(self) -> Iterator[None]:
        """Name the file in what pyarrow raises."""
        with explained(self._pa, self.stored, "Parquet"):
            yield


def table_sounds(
    stored: SourceFile, name: str, *, audio: str | None, caption: str | None, patience: float
) -> Iterator[Listed]:
    """Yield the sounds of a Parquet or an Arrow file, one for each row, in their order.

    Args:
        stored: the file.
        name: its name relative to the source, of which the names of sounds without a path are made.
        audio: the column of sounds; None: the only one.
        caption: the column of captions; None: the first of `CAPTION_COLUMNS`, if there is one.
        patience: seconds to retry a request for.

    Raises:
        ValueError: the table is damaged, or its columns are not clear.
    """
    read = _parquet_rows if name.lower().endswith(".parquet") else _arrow_rows
    stem = posixpath.splitext(name)[0]
    for number, (origin, path, entry, columns) in enumerate(read(stored, audio, caption, patience)):
        captions = captions_of({"caption": entry.get(columns.caption or "")})
        facts = {as_unicode(key): value for key, value in entry.items() if key != columns.caption and value is not None}
        own, home = _name_of(path), f"{stem}-{number:06d}"
        yield Listed(own or home, origin, captions, facts, home, is_named=bool(own))


def _name_of(path: str) -> str:
    """Return a sound's name by its path, of which `datasets` often keeps the last part alone; empty without a path."""
    plain = posixpath.normpath(path.replace("\\", "/").partition("::")[0].replace("\0", "")) if path else ""
    if plain.startswith(("/", "../")) or "://" in path or plain[1:2] == ":":
        plain = posixpath.basename(plain)
    return as_unicode("" if plain in (".", "..") else plain)


_Row = tuple[Origin, str, dict[str, Any], Columns]


def _parquet_rows(stored: SourceFile, audio: str | None, caption: str | None, patience: float) -> Iterator[_Row]:
    file, row = ParquetRows(stored, patience), 0
    columns = choose_columns(file.schema, stored.told, audio, caption)
    for group, count in enumerate(file.groups):
        number = 0
        for entry in _entries(file, group, columns.wanted):
            path = _path_in(entry.pop(columns.audio, None))
            yield (
                TableCell(f"{stored.told} row {row}", stored, columns.audio, group, number, path),
                path,
                entry,
                columns,
            )
            row, number = row + 1, number + 1
        if number != count:
            raise ValueError(f"{stored.told} is damaged: its row group {group} has {number} rows, not {count}")


def _entries(file: ParquetRows, group: int, columns: list[str]) -> Iterator[dict[str, Any]]:
    if not columns:
        yield from ({} for _ in range(file.groups[group]))
    else:
        for batch in file.batches(group, columns, _ROWS):
            yield from batch.to_pylist()


def _arrow_rows(stored: SourceFile, audio: str | None, caption: str | None, patience: float) -> Iterator[_Row]:
    file, row = ArrowFile(require_pyarrow(), stored, patience), 0
    columns = choose_columns(file.schema, stored.told, audio, caption)
    for batch, begin, body in file.batches():
        places = file.places(batch, columns.audio, begin, body)
        paths = _paths_of(batch.column(columns.audio), columns)
        texts = [*([columns.caption] if columns.caption else []), *columns.facts]
        entries = batch.select(texts).to_pylist() if texts else [{} for _ in places]
        for place, path, entry in zip(places, paths, entries, strict=True):
            where = f"{stored.told} row {row}"
            origin = named_file(where, stored, path) if place is None else Section(where, stored, *place)
            yield origin, path, entry, columns
            row += 1


def _paths_of(sounds: Any, columns: Columns) -> list[str]:
    if not columns.has_path:
        return [""] * len(sounds)
    if hasattr(sounds, "field"):
        sounds = sounds.field("path")
    return [_path_in(path) for path in sounds.to_pylist()]


def _path_in(value: object) -> str:
    if isinstance(value, dict):
        value = value.get("path")
    return value if isinstance(value, str) else ""


def named_file(where: str, table: SourceFile, path: str) -> Origin:
    """Return the sound that a row without bytes names: a file relative to the table, or by an absolute path.

    A table on a server must not make this machine read its own files.
    """
    if not path:
        return Lost(where, "has neither bytes nor a path")
    if "://" in path or is_url(table.place):
        return Lost(where, f"names {printable(path)} in place of the sound's bytes, which have to be in the table")
    plain = PurePosixPath(posixpath.normpath(path))
    if plain.parts[:1] == ("..",) or "\0" in path:
        return Lost(where, f"names {printable(path)}, which lies outside of the table's folder")
    try:
        found = local_file(Path(table.place).parent / plain)
    except ValueError as error:
        return Lost(where, f"names a file that can't be read: {printable(str(error))}")
    return Section(where, found, 0, found.size)


class Cells:
    """Reads cells of Parquet files, in their order if it is to be quick: a row group is read on from the last row."""

    def __init__(self, patience: float) -> None:
        self.patience = patience
        self._file: ParquetRows | None = None
        self._at: tuple[str, int] | None = None
        self._next = self._last = 0  # the rows of the row group that `_batch` holds
        self._batch: Any = None
        self._batches: Iterator[Any] = iter(())

    def loaded(self, source: SoundFile) -> SoundFile:
        """Return a sound that any process can open by itself: one of a cell with its bytes. Raises as `read`."""
        return replace(source, origin=self.read(source.origin)) if isinstance(source.origin, TableCell) else source

    def read(self, cell: TableCell) -> Origin:
        """Return a cell's bytes, or the file that its row names; raises SourceError if the table has changed."""
        try:
            value = self._value(cell)
        except ValueError as error:
            raise SourceError(str(error)) from error
        content = value.get("bytes") if isinstance(value, dict) else value
        return (
            InMemory(cell.where, content)
            if isinstance(content, bytes)
            else named_file(cell.where, cell.stored, cell.path)
        )

    def _value(self, cell: TableCell) -> Any:
        if self._file is None or self._file.stored != cell.stored:
            self.close()
            self._file, self._at = ParquetRows(cell.stored, self.patience), None
        if self._at != (cell.column, cell.group) or cell.row < self._next:
            self._at, self._next, self._last = (cell.column, cell.group), 0, 0
            self._batches = self._file.batches(cell.group, [self._leaf(cell.column)], _CELLS)
        while cell.row >= self._last:
            self._batch = next(self._batches, None)
            if self._batch is None:
                raise ValueError(f"{cell.stored.told} is damaged: it has fewer rows than it says")
            self._next, self._last = self._last, self._last + self._batch.num_rows
        return self._batch.column(0)[cell.row - self._next].as_py()

    def _leaf(self, column: str) -> str:
        """Return the name of the bytes alone, as the paths are known."""
        assert self._file is not None
        kind = self._file.file.schema_arrow.field(column).type
        has_bytes = hasattr(kind, "num_fields") and kind.num_fields and kind.get_field_index("bytes") >= 0
        return f"{column}.bytes" if has_bytes else column

    def close(self) -> None:
        """Close the file; raises SourceError if it has changed since it was listed."""
        if self._file is not None:
            require_same(self._file.stored, self.patience)
        self._file = None
