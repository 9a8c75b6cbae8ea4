# SPDX-License-Identifier: GPL-3.0-only
"""Makes the HTML page at /: the version, the settings in force, and links."""

import base64
import hashlib
from collections.abc import Mapping
from html import escape

_STYLE = """
:root { color-scheme: light dark; font: 1rem/1.5 system-ui, sans-serif }
body { max-width: 42rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse }
th, td { padding: .2rem 2rem .2rem 0; text-align: left; vertical-align: top }
th { font-weight: normal }
td { font-family: ui-monospace, monospace; overflow-wrap: anywhere }
"""

_STYLE_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    f"style-src 'sha256-{_STYLE_HASH}'"
)
"""Value of Content-Security-Policy. It allows only the style of this page: the page shows
texts that users wrote."""


def landing_page(version: str, settings: Mapping[str, object]) -> str:
    """Return the HTML of the page; ``settings`` are shown in their order."""
    rows = "\n".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(_shown(value))}</td></tr>'
        for name, value in settings.items()
    )
    return f"""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>tcpexporter</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>tcpexporter {escape(version)}</h1>
<p>Counts long-term TCP connections per local port and IP version.</p>
<ul>
<li><a href="metrics">Metrics</a></li>
<li><a href="-/healthy">Health</a>: is the exporter running?</li>
<li><a href="-/ready">Readiness</a>: can it serve metrics?</li>
</ul>
<h2>Settings in force</h2>
<table>
{rows}
</table>
</body>
</html>
"""


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "not set"
    return "not set" if value is None else str(value)
