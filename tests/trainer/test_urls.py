"""Credentials in URLs are taken out, whatever characters they have."""

from __future__ import annotations

import pytest

from trainer.urls import has_credentials, without_credentials


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:pass@host/x", "https://…host/x"),
        ("https://user:p@ss@host/x", "https://…host/x"),  # such a URL works: all up to the last @ are credentials
        ("get https://u:p@a/x or https://u:q@b/y", "get https://…a/x or https://…b/y"),
        ("https://host/x?X-Amz-Signature=abc&expires=1", "https://host/x?…&…"),
        ("s3://bucket/one@home.wav", "s3://bucket/one@home.wav"),
        ("mail me@home", "mail me@home"),
    ],
)
def test_only_credentials_are_taken_out(text, shown):
    assert without_credentials(text) == shown
    assert has_credentials(text) == (text != shown)
