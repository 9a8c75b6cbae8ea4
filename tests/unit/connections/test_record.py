# SPDX-License-Identifier: GPL-3.0-only
"""Records have the same layout in C and in Python, and their fields are correct."""

import ipaddress
import json
import subprocess
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tcpexporter.connections.parts import SERIES_FIRST, TIME_SHIFT
from tcpexporter.connections.record import (
    CLOSED,
    CONNECTION,
    IPV4_PREFIX,
    KEY,
    SERIES_BITS,
    SERIES_MASK,
    SOCKET,
    ip_versions,
    numbers,
    times_ns,
    words,
)
from tcpexporter.connections.series import (
    FOLDED,
    OUTBOUND,
    OWN,
    REMOTE_PORT,
    SERIES,
    entry_dtype,
)
from tcpexporter.ebpf import ranges
from tcpexporter.ebpf.connection_array import HANDLE_SEEDED
from tcpexporter.ebpf.event_counters import EVENT_KINDS

BPF = Path(__file__).parents[3] / "bpf"

LAYOUT = """
#include <linux/types.h>
#include <stddef.h>
#include <stdio.h>
#define BUCKETS 9
#include "tcp_tracker.h"

#define SIZE(struct_name) \\
    printf("\\"%s\\": %zu,", #struct_name, sizeof(struct struct_name))
#define FIELD(struct_name, field) \\
    printf("\\"%s.%s\\": [%zu, %zu],", #struct_name, #field, \\
           offsetof(struct struct_name, field), \\
           sizeof(((struct struct_name *)0)->field))
#define VALUE(name) printf("\\"%s\\": %lld,", #name, (long long)(name))

int main(void)
{
    printf("{");
    SIZE(connection_key);
    FIELD(connection_key, local_address);
    FIELD(connection_key, remote_address);
    FIELD(connection_key, netns);
    FIELD(connection_key, local_port);
    FIELD(connection_key, remote_port);
    SIZE(connection);
    FIELD(connection, handle);
    FIELD(connection, key);
    FIELD(connection, is_outbound);
    FIELD(connection, pad);
    FIELD(connection, cgroup);
    SIZE(series_key);
    FIELD(series_key, cgroup);
    FIELD(series_key, netns);
    FIELD(series_key, port);
    FIELD(series_key, flags);
    FIELD(series_key, ip_version);
    SIZE(ledger_entry);
    FIELD(ledger_entry, series);
    FIELD(ledger_entry, opened);
    FIELD(ledger_entry, closed);
    FIELD(ledger_entry, failed);
    FIELD(ledger_entry, lifetimes_sum);
    FIELD(ledger_entry, lifetimes);
    SIZE(tracker_events);
    FIELD(tracker_events, inserted);
    FIELD(tracker_events, removed);
    FIELD(tracker_events, refused);
    FIELD(tracker_events, removed_seeds);
    FIELD(tracker_events, allocated);
    FIELD(tracker_events, unrecorded);
    FIELD(tracker_events, listener_changes);
    VALUE(SERIES_OUTBOUND);
    VALUE(SERIES_REMOTE_PORT);
    VALUE(SERIES_FOLDED);
    VALUE(SERIES_OWN);
    VALUE(SERIES_BITS);
    VALUE(SERIES_MASK);
    VALUE(SERIES_FIRST);
    VALUE(TIME_SHIFT);
    VALUE(CLOSED);
    VALUE(HANDLE_SEEDED);
    VALUE(RANGE_BITS);
    VALUE(RANGE_MASK);
    printf("\\"end\\": 0}");
    return 0;
}
"""


def layout_of(name: str, dtype: np.dtype[np.void]) -> dict[str, int | list[int]]:
    layout: dict[str, int | list[int]] = {name: dtype.itemsize}
    assert dtype.fields is not None
    for field, (kind, offset, *_) in dtype.fields.items():
        layout[f"{name}.{field}"] = [offset, kind.itemsize]
    return layout


def test_structs_have_the_same_layout_in_python_and_c(tmp_path: Path) -> None:
    """Every size, offset and constant equals that of the shared header, compiled by gcc."""
    (tmp_path / "layout.c").write_text(LAYOUT)
    program = tmp_path / "layout"
    subprocess.run(
        ["gcc", "-Wall", "-Werror", f"-I{BPF}", "-o", program, tmp_path / "layout.c"],
        check=True,
    )
    in_c = json.loads(subprocess.check_output([program]))
    events = np.dtype([(kind, "u8") for kind in EVENT_KINDS])
    assert in_c == {
        **layout_of("connection_key", KEY),
        **layout_of("connection", CONNECTION),
        **layout_of("series_key", SERIES),
        **layout_of("ledger_entry", entry_dtype(9)),
        **layout_of("tracker_events", events),
        "SERIES_OUTBOUND": OUTBOUND,
        "SERIES_REMOTE_PORT": REMOTE_PORT,
        "SERIES_FOLDED": FOLDED,
        "SERIES_OWN": OWN,
        "SERIES_BITS": SERIES_BITS,
        "SERIES_MASK": SERIES_MASK,
        "SERIES_FIRST": SERIES_FIRST,
        "TIME_SHIFT": TIME_SHIFT,
        "CLOSED": int(CLOSED),
        "HANDLE_SEEDED": int(HANDLE_SEEDED),
        "RANGE_BITS": ranges.RANGE_BITS,
        "RANGE_MASK": ranges.RANGE_SLOTS - 1,
        "end": 0,
    }


def test_keys_and_records_have_no_padding() -> None:
    """Every byte belongs to a field, so comparing bytes compares all fields."""
    for dtype in (KEY, CONNECTION, SOCKET, SERIES, entry_dtype(9), entry_dtype(0)):
        assert dtype.fields is not None
        sizes = [kind.itemsize for kind, *_ in dtype.fields.values()]
        assert sum(sizes) == dtype.itemsize


def test_a_v4_mapped_address_has_ip_version_4() -> None:
    """Only ::ffff:0:0/96 is IPv4 on the wire; similar addresses are IPv6."""
    addresses = {
        "::ffff:192.0.2.1": 4,
        "::ffff:0.0.0.0": 4,
        "::": 6,
        "::1": 6,
        "::192.0.2.1": 6,
        "::fffe:192.0.2.1": 6,
        "::ffff:0:c000:201": 6,
        "1::ffff:c000:201": 6,
        "0:0:1::ffff:192.0.2.1": 6,
        "::1:ffff:c000:201": 6,
        "2001:db8::1": 6,
    }
    keys = np.zeros(len(addresses), KEY)
    for key, address in zip(keys, addresses, strict=True):
        key["local_address"] = list(ipaddress.IPv6Address(address).packed)
    assert ip_versions(keys).tolist() == list(addresses.values())


def test_ip_versions_of_keys_within_records_and_of_no_keys() -> None:
    """The keys may be a field of larger records, and there may be none."""
    connections = np.zeros(3, CONNECTION)
    connections["key"]["local_address"][1, :12] = IPV4_PREFIX
    assert ip_versions(connections["key"]).tolist() == [6, 4, 6]
    assert ip_versions(np.empty(0, KEY)).tolist() == []


@given(
    st.lists(
        st.tuples(
            st.integers(0, SERIES_MASK),
            st.integers(0, 2**59 - 1) | st.sampled_from([8191, 8192, 8193]),
        )
    )
)
def test_a_word_has_number_and_time(pairs: list[tuple[int, int]]) -> None:
    """The number is exact, and the time is less than 8,192 ns too early."""
    given_numbers = np.array([number for number, _ in pairs], np.uint32)
    given_ns = np.array([time for _, time in pairs], np.uint64)
    made = words(given_numbers, given_ns)
    assert numbers(made).tolist() == given_numbers.tolist()
    assert all(0 <= late < 1 << TIME_SHIFT for late in (given_ns - times_ns(made)).tolist())


def test_a_slot_without_connection_has_no_number() -> None:
    """This is so for a slot that was never used, and for one whose connection closed."""
    assert numbers(np.array([0, CLOSED], np.uint64)).tolist() == [0, 0]
    assert CLOSED
