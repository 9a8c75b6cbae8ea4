# SPDX-License-Identifier: GPL-3.0-only
"""The path that a request is for, by RFC 9112, section 3.2 and as Go's ServeMux has it."""

import re
from urllib.parse import quote, unquote

_HOST = r"(?:\[[0-9A-Za-z:.%_~-]+\]|[0-9A-Za-z._~!$&'()*+,;=%-]*)(?::[0-9]*)?"
_ABSOLUTE = re.compile(
    rf"[A-Za-z][A-Za-z0-9+.-]*://(?:[0-9A-Za-z._~!$&'()*+,;=:%-]*@)?{_HOST}(/.*)?"
)
_IS_HOST = re.compile(_HOST)
_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")


def is_host(text: str) -> bool:
    """Whether this may be the value of a Host header: a name or address, and a port."""
    return _IS_HOST.fullmatch(text) is not None


def path_of(target: str) -> str | None:
    """The path of a target in origin-form or, as a proxy may send it, in absolute-form.

    Args:
        target: without the query.

    Returns:
        The path with each escaped byte as a character; None if the target is invalid.
    """
    if not target.startswith("/"):
        absolute = _ABSOLUTE.fullmatch(target)
        if absolute is None:
            return None
        target = absolute[1] or ""
    return None if _BAD_ESCAPE.search(target) else unquote(target, "latin-1")


def clean(path: str) -> str:
    """The same path without empty, ``.`` and ``..`` elements; a slash at its end stays.

    posixpath.normpath would end it at a NUL: Python before 3.11.4.
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
    """A path and a query as a Location header has them."""
    escaped = quote(path, safe="/!$&'()*+,:;=@~", encoding="latin-1")
    return f"{escaped}?{query}" if query else escaped
