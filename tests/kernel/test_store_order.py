# SPDX-License-Identifier: GPL-3.0-only
"""The programs for machines that reorder stores compile, load and count here, too.

A machine that does not reorder stores cannot show their effect: see tests/unit/ordering.
"""

import contextlib
import socket
from dataclasses import replace

import numpy as np
import pytest

from tcpexporter.connections.parts import client_masks
from tcpexporter.connections.record import numbers
from tcpexporter.connections.source import INBOUND
from tcpexporter.ebpf import features, reconcile
from tcpexporter.ebpf.maps import program_info
from tcpexporter.ebpf.tracker import Tracker
from tests.kernel.helpers.in_process import (
    Dumps,
    at_port,
    attach,
    seeds,
    slots_at,
    words_at,
)
from tests.kernel.test_counting import disconnect
from tests.support import Peers

BY_EXCHANGE = (features.STORE_ORDER.name,)
BY_STACK = (features.STORE_ORDER.name, features.EXCHANGE.name)
PARTS = replace(INBOUND, client_masks=client_masks(32, 64))


def attached(without: tuple[str, ...] = ()) -> Tracker:
    return attach(without=without, parts=PARTS, bounds_s=(1,))


@pytest.fixture(params=[BY_EXCHANGE, BY_STACK], ids=["exchange", "two pops"])
def without(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """Return the names of features that the program must not use."""
    if request.param == BY_EXCHANGE and not features.Kernel().has(features.EXCHANGE):
        pytest.skip("the kernel has no exchange")
    missing: tuple[str, ...] = request.param
    return missing


def instructions_and_maps(tracker: Tracker) -> tuple[int, int]:
    """Return xlated_prog_len and nr_map_ids of ``struct bpf_prog_info``."""
    info = program_info(tracker._descriptors.program)
    return int(info[2]) >> 32, int(info[6]) >> 32


@pytest.mark.skipif(not features.STORE_ORDER.probe(None), reason="no total store order")
def test_with_total_store_order_the_program_does_not_order_stores() -> None:
    """The program is the shortest one, and does not have the map for ordering."""
    orders = [(), BY_EXCHANGE, BY_STACK]
    if not features.Kernel().has(features.EXCHANGE):
        orders.remove(BY_EXCHANGE)
    trackers = [attached(each) for each in orders]
    lengths, maps = zip(*map(instructions_and_maps, trackers), strict=True)
    assert sorted(set(lengths)) == [*lengths]
    assert [each - maps[0] for each in maps] == [*[0] * (len(maps) - 1), 1]
    for each in trackers:
        each.close()


def test_openings_and_closings_are_counted(without: tuple[str, ...]) -> None:
    """This includes pre-existing connections; keys and clients are correct."""
    with Peers() as peers, contextlib.ExitStack() as undo:
        peers.connect(11)
        tracker = attached(without)
        undo.callback(tracker.close)
        with Dumps() as dumps:
            reconcile.seed(tracker, dumps)
        opened = [each.getsockname()[1] for each, _ in peers.pairs]
        before = tracker.events().inserted
        peers.connect(7)
        opened += [each.getsockname()[1] for each, _ in peers.pairs[11:]]
        assert tracker.events().inserted >= before + 14  # both ends
        known = at_port(tracker, peers.port)
        assert len(seeds(known)) == 11
        assert sorted(known["key"]["remote_port"]) == sorted(opened)
        (chunk,) = tracker.chunks()
        assert chunk.clients is not None
        assert len(np.unique(chunk.clients[slots_at(tracker, peers.port)])) == 1
        for client, server in peers.pairs[8:]:
            client.close()
            server.close()
        assert len(at_port(tracker, peers.port)) == 8
        assert tracker.events().refused == 0


def test_a_connection_replaces_one_whose_closing_was_missed(
    without: tuple[str, ...],
) -> None:
    """Its socket has the same address: it connects, disconnects and connects again."""
    with Peers() as peers, socket.socket() as client, contextlib.ExitStack() as undo:
        tracker = attached(without)
        undo.callback(tracker.close)
        client.connect(("127.0.0.1", peers.port))
        port = client.getsockname()[1]
        (slot,) = slots = slots_at(tracker, port)
        (old,) = words_at(tracker, slots)
        disconnect(client)
        _, all_words = tracker._used()
        assert not numbers(all_words[slots]).any()
        all_words[slot] = old
        removed = tracker.events().removed
        client.connect(("127.0.0.1", peers.port))
        assert words_at(tracker, slots)[0] > old
        (known,) = at_port(tracker, client.getsockname()[1])
        assert known["key"]["remote_port"] == peers.port
        assert tracker.events().removed == removed + 1
