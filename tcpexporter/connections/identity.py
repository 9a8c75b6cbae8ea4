# SPDX-License-Identifier: GPL-3.0-only
"""Hashes many connection keys at once with SipHash-1-3, to compare hashes instead of keys.

The hash has a secret that is random in each process. So a client that chooses addresses and
ports cannot make the hashes of two connections collide. With a million connections, the
probability that any two collide by chance is 1 in 37 million.

J.-P. Aumasson, D. J. Bernstein: SipHash: a fast short-input PRF (2012).
"""

import numpy as np
import numpy.typing as npt

from tcpexporter.connections.parts import SECRET, ClientMasks
from tcpexporter.connections.record import KEY, Records, ip_versions
from tcpexporter.connections.sets import is_in

Hashes = npt.NDArray[np.uint64]

CLIENT_BITS = 32

Clients = npt.NDArray[np.uint64]
"""Hashes of clients, of `CLIENT_BITS` bits.

Two clients have the same hash with a probability of 1 in 4 billion. An element has 64 bits
because each value of a BPF array map does: array_map_alloc in the kernel's
kernel/bpf/arraymap.c.
"""

FILTER_BITS = 22
"""Number of bits of a hash by which `are_new` compares first: a table of 4 MiB."""

PIECE = 8192
"""Number of keys that are hashed at once: all arrays fit into the cache of a CPU."""

_INITIAL = (0x736F6D6570736575, 0x646F72616E646F6D, 0x6C7967656E657261, 0x7465646279746573)


def hashes(keys: Records, secret: tuple[int, int] = SECRET) -> Hashes:
    """Return the hash of each key, as the BPF program computes it.

    Args:
        keys: of dtype `KEY`.
        secret: the key of the hash, as two numbers of 64 bits.
    """
    width = KEY.itemsize // 8
    return _hashes(np.ascontiguousarray(keys).view(np.uint64).reshape(-1, width), secret)


def client_hashes(
    keys: Records, masks: ClientMasks, secret: tuple[int, int] = SECRET
) -> Clients:
    """Return a hash of the client of each key, as the BPF program computes it.

    Args:
        keys: of dtype `KEY`. The client is the remote address.
        masks: which bits of the address identify a client.
        secret: the key of the hash, as two numbers of 64 bits.
    """
    addresses = np.ascontiguousarray(keys["remote_address"]).view(np.uint64).reshape(-1, 2)
    ipv4, ipv6 = (np.array(each, np.uint64) for each in masks)
    is_ipv4 = ip_versions(keys, "remote_address") == 4
    masked = addresses & np.where(is_ipv4[:, np.newaxis], ipv4, ipv6)
    return _hashes(masked, secret) & np.uint64((1 << CLIENT_BITS) - 1)


def are_new(some: Hashes, known: Hashes) -> npt.NDArray[np.bool_]:
    """Return which hashes are not among ``known``, of which there may be many more."""
    # Most hashes differ from all hashes of the other array in their last bits already.
    # Sorting or searching a million takes a tenth of a second; this takes a hundredth.
    known = known[_may_be_in(known, some)]
    chosen = np.flatnonzero(_may_be_in(some, known))
    are_new = np.ones(len(some), np.bool_)
    are_new[chosen] = ~is_in(some[chosen], known)
    return are_new


def _may_be_in(some: Hashes, others: Hashes) -> npt.NDArray[np.bool_]:
    """Return which hashes have the same last bits as one of ``others``."""
    last_bits = np.uint64((1 << FILTER_BITS) - 1)
    is_there = np.zeros(1 << FILTER_BITS, np.bool_)
    is_there[(others & last_bits).view(np.int64)] = True
    found: npt.NDArray[np.bool_] = is_there[(some & last_bits).view(np.int64)]
    return found


def is_first(some: Hashes) -> npt.NDArray[np.bool_]:
    """Return for each hash whether it is the first of those that are equal to it."""
    ordered = np.sort(some)
    if not (ordered[1:] == ordered[:-1]).any():  # usually; this takes less time
        return np.ones(len(some), np.bool_)
    _, first = np.unique(some, return_index=True)
    is_first = np.zeros(len(some), np.bool_)
    is_first[first] = True
    return is_first


def _hashes(words: Hashes, secret: tuple[int, int]) -> Hashes:
    result = np.empty(len(words), np.uint64)
    for first in range(0, len(words), PIECE):
        piece = slice(first, first + PIECE)
        result[piece] = _hash(words[piece].T.copy(), secret)
    return result


def _hash(columns: Hashes, secret: tuple[int, int]) -> Hashes:
    v = [
        np.full(columns.shape[1], initial ^ secret[index % 2], np.uint64)
        for index, initial in enumerate(_INITIAL)
    ]
    for word in (*columns, np.uint64(8 * len(columns) << 56)):
        v[3] ^= word
        _round(v)
        v[0] ^= word
    v[2] ^= np.uint64(0xFF)
    for _ in range(3):
        _round(v)
    result: Hashes = v[0] ^ v[1] ^ v[2] ^ v[3]
    return result


def _round(v: list[Hashes]) -> None:
    _mix(v, 0, 1, 13)
    _rotate(v[0], 32)
    _mix(v, 2, 3, 16)
    _mix(v, 0, 3, 21)
    _mix(v, 2, 1, 17)
    _rotate(v[2], 32)


def _mix(v: list[Hashes], a: int, b: int, bits: int) -> None:
    v[a] += v[b]
    _rotate(v[b], bits)
    v[b] ^= v[a]


def _rotate(values: Hashes, bits: int) -> None:
    high = values >> np.uint64(64 - bits)
    values <<= np.uint64(bits)
    values |= high
