"""What kinds of stores can do, by the protocol of their URLs."""

from __future__ import annotations

WITH_FOLDERS = ("file", "local", "webdav", "dav", "memory", "sftp", "ssh", "smb", "hdfs", "webhdfs")
"""Protocols that have folders. To make one on an object store would be to make a bucket."""
UNWRITABLE = {
    "http": "HTTP has no folders to write to: take webdav://… (pip install webdav4)",
    "https": "HTTP has no folders to write to: take webdav://… (pip install webdav4)",
    "memory": "what lies there is gone with the process: take a store that outlives it",
}
"""Protocols that no run can be uploaded by, and why."""
