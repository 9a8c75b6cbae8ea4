# SPDX-License-Identifier: GPL-3.0-only
"""Parses request targets (RFC 9112, section 3.2) and cleans paths as Go's ServeMux does."""

import re
from urllib.parse import quote, unquote

_HOST = r"(?:\[[0-9A-Za-z:.%_~-]+\]|[0-9A-Za-z._~!$&'()*+,;=%-]*)(?::[0-9]*)?"
_ABSOLUTE = re.compile(
    rf"[A-Za-z][A-Za-z0-9+.-]*://(?:[0-9A-Za-z._~!$&'()*+,;=:%-]*@)?{_HOST}(/.*)?"
)
_IS_HOST = re.compile(_HOST)
_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")


def is_host(text: str) -> bool:
    """Return whether a text is a valid Host header: a host, optionally with a port."""
    return _IS_HOST.fullmatch(text) is not None


def path_of(target: str) -> str | None:
    """Return the path of a target in origin-form, or in absolute-form as proxies send it.

    Args:
        target: the target without its query.

    Returns:
        The path, in which each escaped byte is one character; None: the target is invalid.
    """
    if not target.startswith("/"):
        absolute = _ABSOLUTE.fullmatch(target)
        if absolute is None:
            return None
        target = absolute[1] or ""
    return None if _BAD_ESCAPE.search(target) else unquote(target, "latin-1")


def clean(path: str) -> str:
    """Return the path without empty, ``.`` and ``..`` elements; a final slash stays.

    It does not use posixpath.normpath, which truncates a path at a NUL before Python
    3.11.4.
    """
    elements: list[str] = []
    for element in path.split("/"):
        if element == "..":
            del elements[-1:]
        elif element not in ("", "."):
            elements.append(element)
    end = "/" if elements and path.endswith("/") else ""
    return f"/{'/'.join(elements)}{end}"


def location(path: str, query: str) -> str:
    """Return the value of a Location header for a path and a query."""
    escaped = quote(path, safe="/!$&'()*+,:;=@~", encoding="latin-1")
    return f"{escaped}?{query}" if query else escaped
