"""What kinds of stores can do, by the protocol of their URLs."""

from __future__ import annotations

import difflib

WITH_FOLDERS = ("file", "local", "webdav", "dav", "memory", "sftp", "ssh", "smb", "hdfs", "webhdfs")
"""Protocols that have folders. To make one on an object store would be to make a bucket."""
UNWRITABLE = {
    "http": "HTTP has no folders to write to: take webdav://… (pip install webdav4)",
    "https": "HTTP has no folders to write to: take webdav://… (pip install webdav4)",
    "memory": "what lies there is gone with the process: take a store that outlives it",
}
"""Protocols that no run can be uploaded by, and why."""


def unknown_protocol(protocol: str) -> str:
    """Return why this machine can't open URLs of a protocol, with the mend; empty if it can."""
    import fsspec  # imported here because most recipes name no store, and the import is slow

    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        return f"a package is missing: {error}"
    except ValueError:
        near = difflib.get_close_matches(protocol, fsspec.available_protocols(), n=1, cutoff=0.0)
        return f"no package knows {protocol}://, the nearest known one is {near[0]}://"
    return ""
