"""A file for pyarrow of which only the bytes that are asked for are read, on this machine or on a server."""

from __future__ import annotations

import io

from trainer.data.bucket import SourceFile
from trainer.data.origins import read_bytes


class LazyFile(io.RawIOBase):
    """A file as it was when it was listed. Its reads raise SourceError, or the OSError of a disk."""

    def __init__(self, stored: SourceFile, patience: float) -> None:
        super().__init__()
        self.stored, self.patience, self._place = stored, patience, 0

    def read(self, count: int | None = -1) -> bytes:  # type: ignore[override]
        """See `io.RawIOBase`."""
        left = max(0, self.stored.size - self._place)
        count = left if count is None or count < 0 else min(count, left)
        content = read_bytes(self.stored, self._place, self._place + count, self.patience) if count else b""
        self._place += len(content)
        return content

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """See `io.RawIOBase`."""
        self._place = max(0, (0, self._place, self.stored.size)[whence] + offset)
        return self._place

    def tell(self) -> int:
        """See `io.RawIOBase`."""
        return self._place

    def readable(self) -> bool:
        """See `io.RawIOBase`."""
        return True

    def seekable(self) -> bool:
        """See `io.RawIOBase`."""
        return True
