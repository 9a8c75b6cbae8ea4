# SPDX-License-Identifier: GPL-3.0-only
"""The connection record: the same in C and in Python, and found again by its bytes."""

import ipaddress
import json
import subprocess
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tcpexporter.connections import (
    CONNECTION,
    IPV4_PREFIX,
    KEY,
    VALUE,
    Direction,
    Records,
    contains,
    ip_versions,
    locate,
)
from tcpexporter.tracker import EVENT_KINDS

BPF = Path(__file__).parents[2] / "bpf"

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
#define ENUM(name) printf("\\"%s\\": %d,", #name, name)

int main(void)
{
    printf("{");
    SIZE(connection_key);
    FIELD(connection_key, local_address);
    FIELD(connection_key, remote_address);
    FIELD(connection_key, netns);
    FIELD(connection_key, local_port);
    FIELD(connection_key, remote_port);
    SIZE(connection_value);
    FIELD(connection_value, established_ns);
    FIELD(connection_value, socket);
    FIELD(connection_value, direction);
    FIELD(connection_value, pad);
    SIZE(tracker_events);
    FIELD(tracker_events, inserted);
    FIELD(tracker_events, removed);
    FIELD(tracker_events, refused);
    ENUM(DIRECTION_INBOUND);
    ENUM(DIRECTION_OUTBOUND);
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


def test_python_lays_the_structs_out_as_c_does(tmp_path: Path) -> None:
    """Every size, offset and enum value is what gcc says of the shared header."""
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
        **layout_of("connection_value", VALUE),
        **layout_of("tracker_events", events),
        **{f"DIRECTION_{each.name}": each.value for each in Direction},
        "end": 0,
    }


def test_keys_and_values_have_no_padding() -> None:
    """Every byte of a record belongs to a field, so comparing bytes is comparing fields."""
    for dtype in (KEY, VALUE, CONNECTION):
        assert dtype.fields is not None
        sizes = [kind.itemsize for kind, *_ in dtype.fields.values()]
        assert sum(sizes) == dtype.itemsize


def test_a_mapped_address_is_of_ip_version_4() -> None:
    """Only ::ffff:0:0/96 is IPv4 on the wire, whatever resembles it."""
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


def test_ip_versions_of_fields_and_of_nothing() -> None:
    """The keys inside connections will do, and so will none."""
    connections = np.zeros(3, CONNECTION)
    connections["key"]["local_address"][1, :12] = IPV4_PREFIX
    assert ip_versions(connections["key"]).tolist() == [6, 4, 6]
    assert ip_versions(np.empty(0, KEY)).tolist() == []


def keys_of(packed: list[bytes]) -> Records:
    keys: npt.NDArray[np.void] = np.frombuffer(b"".join(packed), KEY)
    return keys


# Few different bytes, in few places: the same key comes up often.
some_keys = st.lists(
    st.tuples(
        st.integers(0, KEY.itemsize - 1), st.sampled_from([b"\0", b"\1", b"\xff"])
    ).map(lambda drawn: bytes(drawn[0]) + drawn[1].ljust(KEY.itemsize - drawn[0], b"\0")),
    max_size=23,
)


@settings(deadline=None)
@given(wanted=some_keys, among=some_keys)
def test_keys_are_found_as_a_dict_finds_them(
    wanted: list[bytes], among: list[bytes]
) -> None:
    """What is found has the same bytes, what a dict does not have is not found."""
    places: dict[bytes, list[int]] = {}
    for place, key in enumerate(among):
        places.setdefault(key, []).append(place)
    found = locate(keys_of(wanted), keys_of(among)).tolist()
    assert len(found) == len(wanted)
    for key, place in zip(wanted, found, strict=True):
        assert place in places.get(key, [-1])
    assert contains(keys_of(wanted), keys_of(among)).tolist() == [
        key in places for key in wanted
    ]


@pytest.mark.parametrize(("wanted", "among"), [(0, 0), (0, 3), (3, 0)])
def test_nothing_is_found_in_nothing(wanted: int, among: int) -> None:
    """Empty arrays are taken on either side."""
    keys, others = np.zeros(wanted, KEY), np.zeros(among, KEY)
    assert locate(keys, others).tolist() == [-1] * wanted
    assert contains(keys, others).tolist() == [False] * wanted


def test_one_byte_anywhere_makes_another_key() -> None:
    """Each of the 40 bytes is compared, the last ones and zeros too."""
    changed = np.eye(KEY.itemsize, dtype=np.uint8).view(KEY)[:, 0]
    assert not contains(np.zeros(1, KEY), changed).any()
    assert locate(changed, changed[::-1]).tolist() == list(range(KEY.itemsize))[::-1]


def test_duplicates_are_all_found() -> None:
    """A key that is there twice has one of its places, for each who asks for it."""
    among = np.zeros(5, KEY)
    among["local_port"] = [443, 22, 443, 80, 22]
    wanted = np.zeros(4, KEY)
    wanted["local_port"] = [443, 443, 22, 8443]
    first, second, third, fourth = locate(wanted, among).tolist()
    assert first == second
    assert first in (0, 2)
    assert third in (1, 4)
    assert fourth == -1


def test_keys_of_connections_are_found() -> None:
    """A field of a larger record is looked up by its own bytes alone."""
    connections = np.zeros(7, CONNECTION)
    connections["key"]["remote_port"] = range(7)
    connections["value"]["established_ns"] = 1 << 63
    wanted = connections["key"][::-2].copy()
    assert locate(wanted, connections["key"]).tolist() == [6, 4, 2, 0]
    assert locate(connections["key"], wanted).tolist() == [3, -1, 2, -1, 1, -1, 0]
