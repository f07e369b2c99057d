"""URLs with credentials in them, which no log, config or message may show."""

from __future__ import annotations

import re

_CREDENTIALS = re.compile(r"(?<=://)[^/\s]*@|(?<=[?&])[^\s&=]+=[^\s&]+")
"""`user:password@` in a URL, up to its last @, and the arguments after its `?`, which sign a request."""


def without_credentials(text: str) -> str:
    """Return a text without the credentials of the URLs in it."""
    return _CREDENTIALS.sub("…", text) if "://" in text else text


def has_credentials(url: str) -> bool:
    """Whether a URL holds a user, a password, a key or a signature."""
    return without_credentials(url) != url
