# SPDX-License-Identifier: GPL-3.0-only
"""Compares the counts of an exporter with the connections that ss(8) prints.

This module parses the output of ss without any code of the product.
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
"""Longest time until a reconciliation has ended: the interval plus its duration."""


OWN_PORT = 62003
"""The local port of scrapes. Its series is ignored, because events of these connections
may be missed too. The kernel assigns this port to no other connection."""

_own_addresses = (
    f"127.{x}.{y}.2" for x, y in itertools.cycle(itertools.product(range(1, 251), repeat=2))
)
"""Addresses to scrape at. Each scrape has a new one, because the previous address pair
is in TIME_WAIT."""

Ends = Counter[tuple[str, str]]
"""Connections, each as its local and its remote end, as ss prints them."""

Series = tuple[int, str]
"""A local port and an IP version."""

Counts = Counter[Series]
"""Numbers of established connections by series."""


def set_inside(netns: str, path: str, value: str) -> None:
    """Write to a file in /proc/sys or /sys of a network namespace."""
    subprocess.run(
        ["ip", "netns", "exec", netns, "tee", path],
        input=value,
        stdout=subprocess.DEVNULL,
        text=True,
        check=True,
    )


def established() -> Ends:
    """Return the established connections of this namespace."""
    shown = subprocess.check_output(["ss", "-Htn", "state", "established"], text=True)
    rows = (line.split() for line in shown.splitlines())
    return Counter((local, remote) for _, _, local, remote, *_ in rows)


def by_unit() -> Counter[str]:
    """Return the established connections of this namespace by the unit of the socket."""
    command = ["ss", "-Htn", "--cgroup", "state", "established"]
    words = subprocess.check_output(command, text=True).split()
    names = (each.rpartition("/")[2] for each in words if each.startswith("cgroup:"))
    return Counter(each for each in names if each.endswith(".service"))


def count(ends: Ends) -> Counts:
    """Count connections by local port and IP version on the wire: ::ffff:a.b.c.d is
    IPv4."""
    counts: Counts = Counter()
    for (local, _), number in ends.items():
        address, _, port = local.rpartition(":")
        if port == "*":  # a socket that is being reset has no port any more
            continue
        is_ipv6 = address.startswith("[") and not address.startswith("[::ffff:")
        counts[int(port), "6" if is_ipv6 else "4"] += number
    return counts


def at_ports(counts: Counts, ports: Collection[int]) -> Counts:
    return Counter({each: counts[each] for each in counts if each[0] in ports})


def difference(shown: Counts, true: Counts) -> dict[Series, tuple[int, int]]:
    """Return the exporter's and the true count of each series where they differ."""
    return {
        series: (shown[series], true[series])
        for series in sorted(shown | true)
        if shown[series] != true[series]
    }


class Page:
    """The exposition of one scrape."""

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

    def value(self, name: str, /, **labels: str) -> float | None:
        """Return one value; None if the series does not exist."""
        found = (each.value for each in self.samples(name) if each.labels == labels)
        return next(found, None)

    def counts(self, name: str = ESTABLISHED) -> Counts:
        """Return the counts, without connections of scrapes."""
        counts: Counts = Counter()
        for sample in self.samples(name):
            counts[int(sample.labels["port"]), sample.labels["tcp_version"]] += int(
                sample.value
            )
        del counts[OWN_PORT, "4"]
        return counts

    @property
    def missed(self) -> float | None:
        """The number of missed events; None if the kernel does not count them."""
        return self.value("tcpexporter_missed_events_total")

    @property
    def missed_or_refused(self) -> float | None:
        """The number of missed and refused events, which can make counts wrong."""
        refused = self.value("tcpexporter_kernel_events_total", action="refused")
        if self.missed is None or refused is None:
            return None
        return self.missed + refused

    def corrected(self, kind: str) -> float:
        """Return how many ``missed_open`` or ``missed_close`` were corrected."""
        return self.value("tcpexporter_corrections_total", kind=kind) or 0

    @property
    def has_missed(self) -> bool:
        """Whether events were missed, also on kernels that do not count them."""
        corrected = self.corrected("missed_open") + self.corrected("missed_close")
        return bool(self.missed) or corrected > 0

    @property
    def uncertain(self) -> int:
        """The upper bound of its errors that the exporter publishes."""
        return int(self.value("tcpexporter_uncertain_connections") or 0)

    def is_reconciled_since(self, moment_s: float) -> bool:
        """Return whether a reconciliation both began and ended after this moment."""
        ended_s = self.value("tcpexporter_last_reconcile_timestamp_seconds") or 0
        took_s = self.value("tcpexporter_reconcile_duration_seconds") or 0
        return ended_s - took_s > moment_s


def scrape_and_count(exporter: Exporter) -> tuple[Page, Counts]:
    """Scrape until the counts of ss(8) are equal before and after; return both results."""
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        before = established()
        page = Page(exporter)
        after = established()
        if of_others(before, exporter) == of_others(after, exporter):
            return page, count(of_others(after, exporter))
        time.sleep(0.1)
    raise AssertionError("connections do not stop opening and closing")


def of_others(ends: Ends, exporter: Exporter) -> Ends:
    """Return the connections that are not scrapes of this exporter."""
    own_port = f":{exporter.port}"
    return Counter(
        {
            (local, remote): number
            for (local, remote), number in ends.items()
            if not local.endswith(own_port) and not remote.endswith(own_port)
        }
    )


def scrape_reconciled(exporter: Exporter) -> tuple[Page, Counts]:
    """Scrape like `scrape_and_count`, after a reconciliation that begins after this call.

    No connection of this namespace may open or close. Those of other namespaces may. The
    kernel runs the program for them too, so it can miss events at any time.
    """
    moment_s = time.time()
    until = time.monotonic() + RECONCILED_S
    while time.monotonic() < until:
        page, true = scrape_and_count(exporter)
        if page.is_reconciled_since(moment_s):
            return page, true
        time.sleep(0.1)
    raise AssertionError("the exporter does not reconcile")
