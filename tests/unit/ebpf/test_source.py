# SPDX-License-Identifier: GPL-3.0-only
"""The end of the source ``ebpf`` while one of its threads is busy."""

from types import SimpleNamespace
from typing import cast

import pytest

from tcpexporter.ebpf.source import EbpfSource


@pytest.mark.parametrize(
    ("reconciled", "saved", "closed"),
    [
        (True, True, ["maps", "tables", "pins"]),
        (False, True, ["pins"]),
        (True, False, ["pins"]),
    ],
)
def test_maps_that_a_thread_still_uses_stay_open(
    reconciled: bool, saved: bool, closed: list[str]
) -> None:
    """The kernel could give their descriptors to other files, and a thread that reads
    an unmapped array would crash the exporter at its end."""
    done: list[str] = []

    def closing(name: str) -> SimpleNamespace:
        return SimpleNamespace(close=lambda: done.append(name))

    saving = SimpleNamespace(stop=lambda _: saved)
    source = SimpleNamespace(
        _reconciler=SimpleNamespace(close=lambda: reconciled),
        _state=SimpleNamespace(tasks=lambda: [saving]),
        _tracker=closing("maps"),
        _tables=closing("tables"),
        _pins=closing("pins"),
    )
    EbpfSource.close(cast("EbpfSource", source))
    assert done == closed
