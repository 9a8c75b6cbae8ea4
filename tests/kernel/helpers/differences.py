# SPDX-License-Identifier: GPL-3.0-only
"""Lists the connections of a port in the maps of a running exporter and in socket tables.

A soak test prints this when a count is wrong: each connection with its record, slot and
handle, and the connections of the socket tables.
"""

import contextlib

import numpy as np

from tcpexporter.clock import boottime_ns
from tcpexporter.connections.record import (
    SERIES_MASK,
    Records,
    numbers,
    times_ns,
)
from tcpexporter.ebpf.connection_array import HANDLE_SEEDED, ConnectionArray
from tcpexporter.ebpf.maps import Map
from tcpexporter.socket_tables.tables import open_tables
from tests.kernel.helpers.borrowed import borrowed


def explain(process: int, port: int) -> str:
    """Return one line for each connection of a local port in the maps or the tables."""
    with contextlib.closing(open_tables("sock_diag", "self")) as tables:
        shown = tables.established(with_ages=True)
    with borrowed(process) as (maps, _):
        handles, slots = Map(maps["slots"][0], "slots").items(np.uint64, np.uint32)
        descriptor, entries = maps["connections"]
        words_descriptor, _ = maps["series_and_time"]
        array = ConnectionArray(descriptor, words_descriptor, entries)
        records, words = array.used()
        records, words = records.copy(), words.copy()
    slot_of = dict(zip(handles.tolist(), slots.tolist(), strict=True))
    shown = shown[shown["key"]["local_port"] == port]
    is_here = records["key"]["local_port"] == port
    is_here &= numbers(words) != 0
    lines = [f"port {port}: {len(shown)} in the tables, {is_here.sum()} in the map"]
    lines += [f"  table  {_key(each)}" for each in shown]
    lines += [
        f"  slot {slot} {_record(records[slot], words[slot], slot, slot_of)}"
        for slot in np.flatnonzero(is_here).tolist()
    ]
    return "\n".join(lines)


def _record(record: Records, word: np.uint64, slot: int, slot_of: dict[int, int]) -> str:
    handle = int(record["handle"])
    owner = slot_of.get(handle)
    origin = "table" if handle & int(HANDLE_SEEDED) else "event"
    age_s = (boottime_ns() - int(times_ns(np.array([word]))[0])) / 1e9
    owned = "owned" if owner == slot else f"its handle has slot {owner}"
    return (
        f"{_key(record)} series {int(word) & SERIES_MASK} from {origin}, {age_s:.3f} s,"
        f" handle {handle:#x} {owned}"
    )


def _key(record: Records) -> str:
    key = record["key"]
    ends = (
        f"{bytes(key[f'{end}_address']).hex()}:{key[f'{end}_port']}"
        for end in ("local", "remote")
    )
    return " ".join((*ends, f"netns {key['netns']}"))
