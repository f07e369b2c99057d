"""Finds where the bytes of sounds lie in an Arrow file, in the format of streams or in that of files.

The format of files is that of streams between a magic word and a footer that repeats where the batches are, so that
both are read as a stream, one batch at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from trainer.data.bucket import SourceError, SourceFile
from trainer.data.lazy_file import LazyFile
from trainer.data.origins import read_bytes
from trainer.data.remote import is_url
from trainer.file_names import printable

_MAGIC = b"ARROW1"
_END_MARKS = (b"\xff\xff\xff\xff\0\0\0\0", b"\0\0\0\0")
_MEND = "write the table as Parquet"

Place = tuple[int, int]
"""First byte, and number of bytes."""


class ArrowFile:
    """An Arrow file, on this machine or on a server. Errors name the file.

    Attributes:
        schema: pyarrow's schema.

    Raises:
        ValueError: the file is damaged, or is no Arrow file.
    """

    def __init__(self, pa: Any, stored: SourceFile, patience: float) -> None:
        self._pa, self.stored, self.patience = pa, stored, patience
        self._is_file = self._read(0, len(_MAGIC)) == _MAGIC
        if self._is_file and self._read(stored.size - len(_MAGIC), stored.size) != _MAGIC:
            raise ValueError(f"{stored.told} is cut off: the end of an Arrow file is missing")
        with self.damage():
            if is_url(stored.place):
                self._file = pa.PythonFile(LazyFile(stored, patience), mode="r")
            else:
                self._file = pa.memory_map(stored.place)  # a batch may be large, and of its sounds nothing is read
            self._file.seek(8 if self._is_file else 0)
            self._messages = pa.ipc.MessageReader.open_stream(self._file)
            self.schema = pa.ipc.read_schema(self._messages.read_next_message())

    def batches(self) -> Iterator[tuple[Any, int, Any]]:
        """Yield each batch, the place of its body in the file, and the body."""
        while True:
            with self.damage():
                try:
                    message = self._messages.read_next_message()
                except StopIteration:
                    break
                if message.type != "record batch":
                    raise ValueError(f"it holds a {message.type}: {_MEND}")
                batch = self._pa.ipc.read_record_batch(message, self.schema)
                batch.validate(full=True)
                body = message.body
            yield batch, self._file.tell() - body.size, body
        at = self._file.tell()
        if not self._is_file and not self._read(max(0, at - 8), at).endswith(_END_MARKS):
            raise ValueError(f"{self.stored.told} is cut off: the end of an Arrow stream is missing")

    def places(self, batch: Any, column: str, begin: int, body: Any) -> list[Place | None]:
        """Return where the bytes of each row of a batch lie in the file; None for a row without bytes.

        Args:
            batch: of `batches`.
            column: the column of sounds.
            begin: the place of the batch's body in the file.
            body: the body.
        """
        sounds = batch.column(column)
        kind, valid = sounds.type, np.asarray(sounds.is_valid())
        if self._pa.types.is_struct(kind):
            if kind.get_field_index("bytes") < 0:
                return [None] * len(batch)
            sounds = sounds.field(kind.get_field_index("bytes"))
            kind, valid = sounds.type, valid & np.asarray(sounds.is_valid())
        if self._pa.types.is_string(kind) or self._pa.types.is_large_string(kind) or not valid.any():
            return [None] * len(batch)
        wide = self._pa.types.is_large_binary(kind)
        _, offsets, values = sounds.buffers()
        ends = np.frombuffer(
            offsets, np.int64 if wide else np.int32, len(sounds) + 1, sounds.offset * (8 if wide else 4)
        )
        first = values.address - body.address
        if not 0 <= first <= first + values.size <= body.size:
            raise ValueError(f"{self.stored.told} holds compressed batches: {_MEND}")
        starts, sizes = (begin + first + ends[:-1].astype(np.int64)).tolist(), np.diff(ends).tolist()
        return [place if used else None for *place, used in zip(starts, sizes, valid.tolist(), strict=True)]  # type: ignore[misc]

    def _read(self, start: int, end: int) -> bytes:
        return read_bytes(self.stored, max(0, start), min(end, self.stored.size), self.patience)

    @contextmanager
    def damage(self) -> Iterator[None]:
        """Name the file in what pyarrow raises."""
        with explained(self._pa, self.stored, "Arrow"):
            yield


@contextmanager
def explained(pa: Any, stored: SourceFile, kind: str) -> Iterator[None]:
    """Name a table in what pyarrow raises of its damage; the errors of disks and servers stay as they are."""
    try:
        yield
    except SourceError:
        raise
    except (pa.ArrowException, OSError, ValueError, OverflowError, StopIteration) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = printable(" ".join(str(error).split()))[:200] or "it has no schema"
        raise ValueError(f"{stored.told} is damaged, or is no {kind} file: {reason}") from error
