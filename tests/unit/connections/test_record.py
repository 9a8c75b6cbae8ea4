# SPDX-License-Identifier: GPL-3.0-only
"""Records have the same layout in C and in Python, and their fields are computed right."""

import ipaddress
import json
import subprocess
from pathlib import Path

import numpy as np

from tcpexporter.connections.record import (
    CONNECTION,
    DIRECTION_BIT,
    GROUP_BITS,
    GROUP_IPV6,
    IPV4_PREFIX,
    KEY,
    PORTS,
    SOCKET,
    Direction,
    directions,
    groups,
    ip_versions,
)
from tcpexporter.ebpf.connection_array import HANDLE_SEEDED
from tcpexporter.ebpf.slot_ranges import RANGE_BITS, RANGE_SLOTS
from tcpexporter.ebpf.tracker import EVENT_KINDS

BPF = Path(__file__).parents[3] / "bpf"

LAYOUT = """
#include <linux/types.h>
#include <stddef.h>
#include <stdio.h>
#include "tcp_tracker.h"

#define SIZE(struct_name) \\
    printf("\\"%s\\": %zu,", #struct_name, sizeof(struct struct_name))
#define FIELD(struct_name, field) \\
    printf("\\"%s.%s\\": [%zu, %zu],", #struct_name, #field, \\
           offsetof(struct struct_name, field), \\
           sizeof(((struct struct_name *)0)->field))
#define VALUE(name) printf("\\"%s\\": %d,", #name, name)

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
    FIELD(connection, established_ns);
    FIELD(connection, handle);
    FIELD(connection, key);
    FIELD(connection, group);
    FIELD(connection, pad);
    SIZE(tracker_events);
    FIELD(tracker_events, inserted);
    FIELD(tracker_events, removed);
    FIELD(tracker_events, refused);
    FIELD(tracker_events, removed_seeds);
    FIELD(tracker_events, allocated);
    FIELD(tracker_events, unrecorded);
    VALUE(GROUP_IPV6);
    VALUE(GROUP_OUTBOUND);
    VALUE(GROUPS);
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
        **layout_of("tracker_events", events),
        "GROUP_IPV6": GROUP_IPV6,
        "GROUP_OUTBOUND": Direction.OUTBOUND << DIRECTION_BIT,
        "GROUPS": 1 << GROUP_BITS,
        "HANDLE_SEEDED": int(HANDLE_SEEDED),
        "RANGE_BITS": RANGE_BITS,
        "RANGE_MASK": RANGE_SLOTS - 1,
        "end": 0,
    }


def test_keys_and_records_have_no_padding() -> None:
    """Every byte belongs to a field, so comparing bytes compares all fields."""
    for dtype in (KEY, CONNECTION, SOCKET):
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


def test_a_group_has_port_ip_version_and_direction() -> None:
    """A group shows all three. No group is 0, because 0 means no connection."""
    keys = np.zeros(4, KEY)
    keys["local_port"] = [1, 443, 65535, 443]
    keys["local_address"][1::2, :12] = IPV4_PREFIX
    ways = np.array([0, 0, 1, 1], np.uint8)
    group = groups(keys, ways)
    assert (group & (PORTS - 1)).tolist() == [1, 443, 65535, 443]
    assert (group & GROUP_IPV6 != 0).tolist() == [True, False, True, False]
    assert directions(group).tolist() == ways.tolist()
    assert (group > 0).all()
    assert (group < 1 << GROUP_BITS).all()
    assert groups(keys, Direction.INBOUND).tolist() == [
        1 | GROUP_IPV6,
        443,
        65535 | GROUP_IPV6,
        443,
    ]
