# SPDX-License-Identifier: GPL-3.0-only
"""Request targets: cleaning a path does not change which page it means."""

import posixpath
import re
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpexporter.web.targets import clean, is_host, location, path_of

PATHS = st.lists(st.sampled_from(("a", "b", ".", "..", "", "...", "\n", "\xff", "%", "\\")))


@given(PATHS.map("/".join))
def test_a_path_is_cleaned_like_normpath(path: str) -> None:
    """The result is that of posixpath.normpath, except for the final slash."""
    cleaned = clean(path)
    assert cleaned.rstrip("/") == posixpath.normpath(f"/{path.lstrip('/')}").rstrip("/")
    assert cleaned.endswith("/") == (cleaned == "/" or path.endswith("/"))
    assert clean(cleaned) == cleaned


def test_cleaning_does_not_end_at_a_null_character() -> None:
    """posixpath.normpath of Debian 12's Python truncates such a path."""
    assert clean("/metrics\0//x") == "/metrics\0/x"


@given(st.binary().map(lambda each: each.decode("latin-1")), st.sampled_from(("", "a=%2F")))
def test_a_redirect_stays_on_this_host(path: str, query: str) -> None:
    """The Location header has the cleaned path, without bytes that would end the header."""
    cleaned = clean(path)
    where = location(cleaned, query)
    assert re.fullmatch(r"/(?:[^/\\\s][!-~]*)?", where)
    written, _, asked = where.partition("?")
    assert path_of(written) == cleaned
    assert asked == query


@given(st.binary().map(lambda each: b"/" + each))
def test_a_path_is_decoded_to_bytes(path: bytes) -> None:
    """Each escaped byte becomes one character, whatever encoding the client uses."""
    assert path_of(quote(path)) == path.decode("latin-1")


@pytest.mark.parametrize(
    ("target", "path"),
    [
        ("/", "/"),
        ("/metrics", "/metrics"),
        ("/%6Detrics", "/metrics"),
        ("//host/metrics", "//host/metrics"),
        ("http://host/metrics", "/metrics"),
        ("http://host:9690/metrics", "/metrics"),
        ("http://host:/metrics", "/metrics"),
        ("HTTP://HOST/metrics", "/metrics"),
        ("https://host/metrics", "/metrics"),
        ("http://alice:secret@host/metrics", "/metrics"),
        ("http://192.0.2.1/metrics", "/metrics"),
        ("http://[::1]:9690/metrics", "/metrics"),
        ("http://[fe80::1%25eth0]:9690/metrics", "/metrics"),
        ("http://host//metrics", "//metrics"),
        ("http://host", ""),
        ("*", None),
        ("", None),
        ("metrics", None),
        ("host:9690", None),
        ("http:/metrics", None),
        ("http://host:port/metrics", None),
        ("http://[::1/metrics", None),
        ("http://ho^st/metrics", None),
        ("http://a@b@host/metrics", None),
        ("://host/metrics", None),
        ("/metrics%", None),
        ("/metrics%4", None),
        ("/metrics%zz", None),
        ("http://host/%zz", None),
    ],
)
def test_the_path_of_a_target_is_found(target: str, path: str | None) -> None:
    """Targets in origin-form and absolute-form have a path; others have none."""
    assert path_of(target) == path


@pytest.mark.parametrize(
    ("host", "valid"),
    [
        *((each, True) for each in ("", "x", "x:80", "x:", "[::1]:80", "a_b-c.d", "x%41")),
        *(
            (each, False)
            for each in ("a b", "a/b", "a@b", "x:y", "[::1", "x,y z", "a\xe9", "?")
        ),
    ],
)
def test_an_invalid_host_is_detected(host: str, *, valid: bool) -> None:
    """A server must respond with 400 (RFC 9112, section 3.2)."""
    assert is_host(host) == valid
