# SPDX-License-Identifier: GPL-3.0-only
"""What ss(8) says and what the exporter says, in a form that can be compared.

What the exporter must say is read from what ss prints, by nothing of the product.
"""

import http.client
import itertools
import subprocess
import time
from collections import Counter
from collections.abc import Collection, Iterator

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from tests.support import ESTABLISHED, Exporter

PATIENCE_S = 61.0
RECONCILED_S = 60 + 41.0
"""The interval, which is the longest without a reason to reconcile, and what that takes."""


OWN_PORT = 62003
"""From which pages are asked for, so that this port's series is left out: the kernel may
miss the events of these connections, too. The kernel chooses it for nothing else."""

_own_addresses = (
    f"127.{x}.{y}.2" for x, y in itertools.cycle(itertools.product(range(1, 251), repeat=2))
)
"""A new one for each page: the last connection's pair of addresses is in TIME_WAIT."""

Ends = Counter[tuple[str, str]]
"""Connections by their local and their remote end, as ss prints them."""

Series = tuple[int, str]
"""A local port and an IP version."""

Counts = Counter[Series]
"""How many connections are established."""


def set_inside(netns: str, path: str, value: str) -> None:
    """Set what /proc/sys or /sys has of a network namespace."""
    subprocess.run(
        ["ip", "netns", "exec", netns, "tee", path],
        input=value,
        stdout=subprocess.DEVNULL,
        text=True,
        check=True,
    )


def established() -> Ends:
    """The established connections of this namespace."""
    shown = subprocess.check_output(["ss", "-Htn", "state", "established"], text=True)
    rows = (line.split() for line in shown.splitlines())
    return Counter((local, remote) for _, _, local, remote, *_ in rows)


def count(ends: Ends) -> Counts:
    """Connections by the IP version on the wire: ::ffff:a.b.c.d is IPv4."""
    counts: Counts = Counter()
    for (local, _), number in ends.items():
        address, _, port = local.rpartition(":")
        is_ipv6 = address.startswith("[") and not address.startswith("[::ffff:")
        counts[int(port), "6" if is_ipv6 else "4"] += number
    return counts


def at_ports(counts: Counts, ports: Collection[int]) -> Counts:
    return Counter({each: counts[each] for each in counts if each[0] in ports})


def difference(shown: Counts, true: Counts) -> dict[Series, tuple[int, int]]:
    """Where they differ: how many there are and how many there should be."""
    return {
        series: (shown[series], true[series])
        for series in sorted(shown | true)
        if shown[series] != true[series]
    }


class Page:
    """One scrape."""

    def __init__(self, exporter: Exporter) -> None:
        connection = http.client.HTTPConnection(
            "127.0.0.1",
            exporter.port,
            timeout=PATIENCE_S,
            source_address=(next(_own_addresses), OWN_PORT),
        )
        try:
            connection.request("GET", "/metrics")
            response = connection.getresponse()
            text = response.read().decode()
        finally:
            connection.close()
        assert response.status == 200, text
        self.families = list(text_string_to_metric_families(text))

    def samples(self, name: str) -> Iterator[Sample]:
        return (
            sample
            for family in self.families
            for sample in family.samples
            if sample.name == name
        )

    def value(self, name: str, **labels: str) -> float | None:
        """One value, None where there is no such series."""
        found = (each.value for each in self.samples(name) if each.labels == labels)
        return next(found, None)

    def counts(self, name: str = ESTABLISHED) -> Counts:
        """The connections, but those that pages come through."""
        counts: Counts = Counter()
        for sample in self.samples(name):
            counts[int(sample.labels["port"]), sample.labels["tcp_version"]] += int(
                sample.value
            )
        del counts[OWN_PORT, "4"]
        return counts

    @property
    def missed(self) -> float | None:
        """Events that the kernel did not tell of; None: it does not count them."""
        return self.value("tcpexporter_missed_events_total")

    @property
    def trouble(self) -> float | None:
        """What may have made it wrong: events that were missed, or that had no room."""
        refused = self.value("tcpexporter_kernel_events_total", action="refused")
        if self.missed is None or refused is None:
            return None
        return self.missed + refused

    def corrected(self, kind: str) -> float:
        """Connections that were ``missed_open`` or ``missed_close``."""
        return self.value("tcpexporter_corrections_total", kind=kind) or 0

    @property
    def has_missed(self) -> bool:
        """Whether events were missed, as can be told where they are not counted, too."""
        if self.missed is None:
            return self.corrected("missed_open") + self.corrected("missed_close") > 0
        return self.missed > 0

    def is_reconciled_since(self, moment_s: float) -> bool:
        """Whether a comparison with the socket tables both began and ended since then."""
        ended_s = self.value("tcpexporter_last_reconcile_timestamp_seconds") or 0
        took_s = self.value("tcpexporter_reconcile_duration_seconds") or 0
        return ended_s - took_s > moment_s


def look(exporter: Exporter) -> tuple[Page, Counts]:
    """A page, and the counts that were true all the while it was made."""
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        before = established()
        page = Page(exporter)
        after = established()
        if _of_others(before, exporter) == _of_others(after, exporter):
            return page, count(_of_others(after, exporter))
        time.sleep(0.1)
    raise AssertionError("connections go on opening and closing")


def _of_others(ends: Ends, exporter: Exporter) -> Ends:
    own_port = f":{exporter.port}"
    return Counter(
        {
            (local, remote): number
            for (local, remote), number in ends.items()
            if not local.endswith(own_port) and not remote.endswith(own_port)
        }
    )


def look_reconciled(exporter: Exporter) -> tuple[Page, Counts]:
    """As `look`, when a reconciliation has begun and ended since now.

    It must be quiet already. Events of other namespaces do not matter: the kernel may run
    the program for them, and miss some, without end.
    """
    moment_s = time.time()
    until = time.monotonic() + RECONCILED_S
    while time.monotonic() < until:
        page, true = look(exporter)
        if page.is_reconciled_since(moment_s):
            return page, true
        time.sleep(0.1)
    raise AssertionError("it does not reconcile")
