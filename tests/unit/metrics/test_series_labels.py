# SPDX-License-Identifier: GPL-3.0-only
"""Label values of series: ports, IP versions, directions and namespaces."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpexporter.config.values import LABELS
from tcpexporter.connections.series import FOLDED, OUTBOUND, REMOTE_PORT
from tcpexporter.metrics.series_labels import Labels, label_values
from tests.unit.series_rows import series_of_rows

NAMES = {7: "blue", 11: "container:0123456789ab"}


def values_of(row: tuple[int, int, int, int], *labels: str) -> Labels:
    """Return the label values of one series: IP version, flags, port, namespace."""
    (found,) = label_values(series_of_rows([row]), labels, NAMES)
    return found


@pytest.mark.parametrize(
    ("row", "port", "remote_port"),
    [
        ((4, 0, 443, 0), "443", ""),
        ((4, 0, 65535, 0), "65535", ""),
        ((4, OUTBOUND, 40001, 0), "40001", ""),
        ((4, OUTBOUND | REMOTE_PORT, 5432, 0), "", "5432"),
        ((4, REMOTE_PORT, 5432, 0), "", "5432"),
        ((4, FOLDED, 0, 0), "other", ""),
        ((4, FOLDED | OUTBOUND, 0, 0), "other", ""),
        ((4, FOLDED | OUTBOUND | REMOTE_PORT, 0, 0), "", "other"),
        ((4, OUTBOUND, 0, 0), "", ""),
    ],
)
def test_a_port_is_either_local_or_remote(
    row: tuple[int, int, int, int], port: str, remote_port: str
) -> None:
    """The other label is empty; a folded series has the value other."""
    assert values_of(row, "port", "remote_port") == (port, remote_port)
    assert values_of(row, "port") == (port,)
    assert values_of(row, "remote_port") == (remote_port,)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ((4, 0, 443, 7), "blue"),
        ((4, 0, 443, 11), "container:0123456789ab"),
        ((4, 0, 443, 17), "17"),
        ((4, 0, 443, 2**32 - 1), "4294967295"),
        ((4, FOLDED, 0, 7), "blue"),
        ((4, FOLDED, 0, 17), "17"),
        ((4, FOLDED, 0, 0), "other"),
    ],
)
def test_a_namespace_has_its_name_or_its_inode(
    row: tuple[int, int, int, int], expected: str
) -> None:
    """A series folded within a namespace keeps its name; one of several has other."""
    assert values_of(row, "netns") == (expected,)


def test_ip_version_and_direction() -> None:
    """The direction is that of the flag, whatever port the series has."""
    assert values_of((4, 0, 443, 0), "tcp_version", "direction") == ("4", "inbound")
    assert values_of((6, OUTBOUND, 1, 0), "tcp_version", "direction") == ("6", "outbound")
    flags = OUTBOUND | REMOTE_PORT | FOLDED
    assert values_of((6, flags, 0, 0), "direction") == ("outbound",)


@given(
    st.lists(
        st.tuples(
            st.sampled_from([4, 6]),
            st.sampled_from([0, OUTBOUND, OUTBOUND | REMOTE_PORT]),
            st.integers(1, 65535),
            st.integers(1, 2**32 - 1),
        )
    )
)
def test_any_labels_are_the_same_values_in_the_given_order(
    rows: list[tuple[int, int, int, int]],
) -> None:
    """A label does not depend on other labels. Without labels the tuple is empty."""
    series = series_of_rows(rows)
    columns = {each: label_values(series, (each,), NAMES) for each in LABELS}
    for size in range(len(LABELS) + 1):
        for chosen in combinations(LABELS, size):
            expected = [
                tuple(columns[each][at][0] for each in chosen) for at in range(len(rows))
            ]
            assert label_values(series, chosen, NAMES) == expected
