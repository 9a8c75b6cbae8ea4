# SPDX-License-Identifier: GPL-3.0-only
"""Makes the HTML of the status page at /, and the JSON that its script reads."""

import json
import time
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from tcpexporter.metrics.history import UNKNOWN
from tcpexporter.metrics.status import Expected, Row, Status

WIDTH, HEIGHT = 120, 20
"""Size of a bar and of a sparkline, in units of the picture's viewBox."""

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "connect-src 'self'; img-src data:; script-src 'self'; style-src 'self'"
)
"""Value of Content-Security-Policy. It is strict, because the page shows texts of users."""


def to_json(status: Status, interval_s: float) -> bytes:
    """Return the data of /api/v1/connections.

    Args:
        status: the data.
        interval_s: the time until the next data can be requested, in seconds.
    """
    data: dict[str, Any] = dict(vars(status))
    data["expected"] = [
        {**each._asdict(), "is_met": each.is_met, "text": _expected_text(each)}
        for each in status.expected
    ]
    data |= {"trust": _trust(status), "compared": _compared(status)}
    return json.dumps({"interval_s": interval_s, **data}, separators=(",", ":")).encode()


def to_html(
    status: Status | None,
    *,
    version: str,
    settings: Mapping[str, str],
    reload_s: int,
    trouble: str = "",
) -> bytes:
    """Return the page.

    Args:
        status: the data; None: there is none, because of ``trouble``.
        version: the version of the exporter.
        settings: the flags in force and their values, in the order to show them.
        reload_s: after this many seconds a browser without JavaScript loads the page again.
        trouble: the reason why there is no data.
    """
    main = _main(status) if status else f'<p class="missing">{escape(trouble)}</p>'
    script = '<script src="static/status.js" defer></script>' if status else ""
    refresh = f'<meta http-equiv="refresh" content="{reload_s}">'
    return f"""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>tcpexporter</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="static/status.css">
{f"<noscript>{refresh}</noscript>" if status else refresh}
{script}
</head>
<body>
<header>
<h1>tcpexporter <small>{escape(version)}</small></h1>
<p id="stale" role="status" hidden></p>
</header>
<main>
{main}
</main>
{_details(status, settings)}
</body>
</html>
""".encode()


def _main(status: Status) -> str:
    long_term = f"for at least {status.duration_s} s"
    trust = "exact" if status.uncertain == 0 else "uncertain"
    tiles = "\n".join(
        f'<div class="tile"><dt>{name}</dt><dd><strong id="{key}"{extra}>{shown}</strong>'
        f"<small{note_id}>{note}</small></dd></div>"
        for name, key, extra, shown, note_id, note in (
            ("Connections", "connections", "", _number(status.connections), "", "now"),
            ("Long-term", "long_term", "", _number(status.long_term), "", long_term),
            ("Clients", "clients", "", _number(status.clients), "", "of all series"),
            (
                *("Trust", "trust", f' class="{trust}"', _trust(status)),
                *(' id="compared"', _compared(status)),
            ),
        )
    )
    expected = "\n".join(
        f'<li class="{kind}">{escape(_expected_text(each))}</li>'
        for each in status.expected
        for kind in ["met" if each.is_met else "missing"]
    )
    heads = [*status.labels, *_COLUMNS]
    sorted_at = len(status.labels)
    head = "".join(
        f'<th scope="col"{_head_attributes(at, sorted_at)}>{escape(each)}</th>'
        for at, each in enumerate(heads)
    )
    rows = "\n".join(_row(each, status.age_segments) for each in status.rows)
    return f"""\
<dl class="tiles">
{tiles}
</dl>
<ul class="expected" id="expected" aria-label="Expected connections">
{expected}
</ul>
<h2 id="heading">Connections by {escape(", ".join(status.labels) or "host")}</h2>
<p id="filtering" hidden><label>Filter <input id="filter" type="search"
 placeholder="443, nginx" autocomplete="off"></label></p>
<p class="quiet" id="shown" role="status">{_number(len(status.rows))} series</p>
<div class="scroll" id="series" role="region" aria-labelledby="heading" tabindex="0">
<table>
<thead><tr>{head}</tr></thead>
<tbody>
{rows}
</tbody>
</table>
</div>
{_left_out(status)}"""


_COLUMNS = (
    "established",
    "long-term",
    "clients",
    "opened/min",
    "closed/min",
    "ages",
    "last 15 minutes",
)


def _head_attributes(at: int, sorted_at: int) -> str:
    if at < sorted_at:
        return ' class="label"'
    if at >= sorted_at + len(_COLUMNS) - 2:
        return ' class="label"'
    return ' aria-sort="descending"' if at == sorted_at else ""


def _left_out(status: Status) -> str:
    parts = []
    if status.left_out:
        parts.append(f"{_number(status.left_out)} series with fewer connections")
    if status.folded:
        parts.append(f'{_number(status.folded)} series that are added up as "other"')
    return f'<p class="quiet">Not shown: {", ".join(parts)}.</p>' if parts else ""


def _row(row: Row, segments: Sequence[str]) -> str:
    labels = "".join(f'<td class="label">{escape(each)}</td>' for each in row.labels)
    numbers = "".join(
        f"<td>{each}</td>"
        for each in (
            _number(row.established),
            _number(row.long_term),
            _number(row.clients),
            _rate(row.opened_per_minute),
            _rate(row.closed_per_minute),
        )
    )
    return (
        f"<tr>{labels}{numbers}<td>{_ages(row, segments)}</td><td>{_spark(row)}</td></tr>"
    )


def _ages(row: Row, segments: Sequence[str]) -> str:
    """Return a bar with a segment for each age; its text has the numbers."""
    parts = zip(row.ages, segments, strict=True)
    text = ", ".join(f"{_number(count)} {segment}" for count, segment in parts)
    total, last, x = sum(row.ages), len(row.ages) - 1, 0.0
    rects = []
    for at, count in enumerate(row.ages):
        if count:
            width = WIDTH * count / total
            share = round(100 * at / last) if last else 100
            fill = f"color-mix(in srgb, var(--age-1) {share}%, var(--age-0))"
            rects.append(
                f'<rect x="{x:.1f}" y="0" width="{width:.1f}" height="{HEIGHT}"'
                f' fill="{fill}"/>'
            )
            x += width
    return _picture("ages", text, "".join(rects))


def _spark(row: Row) -> str:
    largest, now = _number(row.largest), _number(row.established)
    step = WIDTH / max(len(row.history) - 1, 1)
    points = [
        f"{at * step:.1f} {HEIGHT - 1 - int(level, 16) / 15 * (HEIGHT - 2):.1f}"
        for at, level in enumerate(row.history)
        if level != UNKNOWN
    ]
    # A single point would not be visible.
    path = f'<path d="M{"L".join(points)}h-2"/>' if points else ""
    return _picture("spark", f"at most {largest} in 15 minutes, now {now}", path)


def _picture(name: str, text: str, content: str) -> str:
    return (
        f'<svg class="{name}" role="img" viewBox="0 0 {WIDTH} {HEIGHT}"'
        f' preserveAspectRatio="none" aria-label="{escape(text)}">{content}</svg>'
    )


def _details(status: Status | None, settings: Mapping[str, str]) -> str:
    rows = "\n".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value or "not set")}</td></tr>'
        for name, value in settings.items()
    )
    source = f"Source: {escape(status.source)}. " if status else ""
    return f"""\
<footer>
<p>{source}<a href="metrics">Metrics</a>,
<a href="api/v1/connections">these data as JSON</a>,
<a href="-/healthy">health</a>, <a href="-/ready">readiness</a></p>
<details>
<summary>Settings in force</summary>
<table>
{rows}
</table>
</details>
</footer>"""


def _trust(status: Status) -> str:
    if status.uncertain is None:
        return "polled"
    return "exact" if status.uncertain == 0 else f"±{_number(status.uncertain)}"


def _compared(status: Status) -> str:
    if status.uncertain is None:
        return f"by {status.source}"
    off = "" if status.uncertain == 0 else f"up to {_number(status.uncertain)} uncertain; "
    if status.compared_s is None:
        return f"{off}not compared with the kernel yet"
    shown = time.strftime("%H:%M:%S UTC", time.gmtime(status.compared_s))
    return f"{off}compared at {shown}"


def _expected_text(each: Expected) -> str:
    sign = "✓" if each.is_met else "✗ missing:"
    minimum = _number(each.minimum)
    return f"{sign} {each.name}: {_number(each.long_term)}, at least {minimum}"


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _rate(value: float) -> str:
    return f"{value:,.1f}".removesuffix(".0")
