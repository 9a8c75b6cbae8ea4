# SPDX-License-Identifier: GPL-3.0-only
"""SipHash-1-3 of many keys, compared with an implementation that follows the paper."""

from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpexporter.connections.identity import (
    FILTER_BITS,
    PIECE,
    are_new,
    client_hashes,
    hashes,
)
from tcpexporter.connections.parts import client_masks
from tcpexporter.connections.record import CONNECTION, KEY, Records

MASK = (1 << 64) - 1


def rotated(value: int, bits: int) -> int:
    return (value << bits | value >> (64 - bits)) & MASK


def siphash(data: bytes, key: bytes, compressions: int, finalizations: int) -> int:
    """SipHash-c-d of any bytes, as in sections 2.1 to 2.3 of the paper."""
    k0, k1 = (int.from_bytes(key[at : at + 8], "little") for at in (0, 8))
    v = [
        k0 ^ 0x736F6D6570736575,
        k1 ^ 0x646F72616E646F6D,
        k0 ^ 0x6C7967656E657261,
        k1 ^ 0x7465646279746573,
    ]

    def rounds(number: int) -> None:
        for _ in range(number):
            v[0] = v[0] + v[1] & MASK
            v[1] = rotated(v[1], 13) ^ v[0]
            v[0] = rotated(v[0], 32)
            v[2] = v[2] + v[3] & MASK
            v[3] = rotated(v[3], 16) ^ v[2]
            v[0] = v[0] + v[3] & MASK
            v[3] = rotated(v[3], 21) ^ v[0]
            v[2] = v[2] + v[1] & MASK
            v[1] = rotated(v[1], 17) ^ v[2]
            v[2] = rotated(v[2], 32)

    padded = data + bytes(7 - len(data) % 8) + bytes([len(data) % 256])
    for at in range(0, len(padded), 8):
        word = int.from_bytes(padded[at : at + 8], "little")
        v[3] ^= word
        rounds(compressions)
        v[0] ^= word
    v[2] ^= 0xFF
    rounds(finalizations)
    return v[0] ^ v[1] ^ v[2] ^ v[3]


def test_the_reference_gives_the_test_vector_of_the_paper() -> None:
    """SipHash-2-4 of 15 bytes (appendix A)."""
    assert siphash(bytes(range(15)), bytes(range(16)), 2, 4) == 0xA129CA6149BE45E5


@given(
    packed=st.lists(st.binary(min_size=KEY.itemsize, max_size=KEY.itemsize), max_size=7),
    secret=st.binary(min_size=16, max_size=16),
)
def test_hashes_equal_those_of_the_reference(packed: list[bytes], secret: bytes) -> None:
    """This holds for any keys and any secret."""
    keys = np.frombuffer(b"".join(packed), KEY)
    halves = (int.from_bytes(secret[:8], "little"), int.from_bytes(secret[8:], "little"))
    assert hashes(keys, halves).tolist() == [siphash(each, secret, 1, 3) for each in packed]


@pytest.mark.parametrize("number", [0, 1, PIECE - 1, PIECE, 2 * PIECE + 101])
def test_a_hash_does_not_depend_on_the_position_of_the_key(number: int) -> None:
    """The keys are fields of larger records, in one piece or in several."""
    connections = np.zeros(number, CONNECTION)
    connections["key"]["remote_port"] = np.arange(number)
    connections["key"]["netns"] = np.arange(number) // 60_000
    found = hashes(connections["key"])
    assert len(np.unique(found)) == number
    assert (hashes(connections["key"][::-1].copy()) == found[::-1]).all()


def test_each_bit_of_a_key_changes_the_hash() -> None:
    """Each of the 320 bits changes about half of the 64 bits of the hash."""
    bits = np.packbits(np.eye(KEY.itemsize * 8, dtype=np.uint8), axis=1)
    found = hashes(bits.view(KEY)[:, 0])
    none = hashes(np.zeros(1, KEY))[0]
    changed = [int(each ^ none).bit_count() for each in found]
    assert len(set(found.tolist())) == len(found)
    assert min(changed) > 8
    assert 30 < sum(changed) / len(changed) < 34


def keys_of(*addresses: str) -> Records:
    """Return keys with these remote addresses; an IPv4 address is v4-mapped."""
    keys = np.zeros(len(addresses), KEY)
    for key, text in zip(keys, addresses, strict=True):
        key["remote_address"] = np.frombuffer(packed_of(text), np.uint8)
    return keys


def packed_of(text: str) -> bytes:
    address = ip_address(text)
    return (b"" if address.version == 6 else bytes(10) + b"\xff\xff") + address.packed


@given(
    addresses=st.lists(st.ip_addresses(), max_size=7),
    ipv4_bits=st.integers(1, 32),
    ipv6_bits=st.integers(1, 128),
    secret=st.binary(min_size=16, max_size=16),
)
def test_the_hash_of_a_client_is_that_of_its_network(
    addresses: list[IPv4Address | IPv6Address],
    ipv4_bits: int,
    ipv6_bits: int,
    secret: bytes,
) -> None:
    """It is the lower half of the hash of the 16 bytes of the network's address."""
    texts = [str(each) for each in addresses]
    halves = (int.from_bytes(secret[:8], "little"), int.from_bytes(secret[8:], "little"))
    networks = []
    for text in texts:
        is_ipv4 = packed_of(text)[:12] == bytes(10) + b"\xff\xff"
        bits = 96 + ipv4_bits if is_ipv4 else ipv6_bits
        networks.append(ip_network((packed_of(text), bits), strict=False))
    expected = [
        siphash(each.network_address.packed, secret, 1, 3) % 2**32 for each in networks
    ]
    found = client_hashes(keys_of(*texts), client_masks(ipv4_bits, ipv6_bits), halves)
    assert found.dtype == np.uint64
    assert found.tolist() == expected


def test_a_client_is_the_same_at_both_kinds_of_sockets() -> None:
    """A dual-stack socket shows an IPv4 client as ::ffff:a.b.c.d, even if the local
    address and all ports differ."""
    keys = keys_of("192.0.2.7", "::ffff:192.0.2.7", "::ffff:192.0.2.8")
    keys["local_address"][0] = np.frombuffer(packed_of("192.0.2.1"), np.uint8)
    keys["local_port"], keys["remote_port"] = [1, 2, 3], [4, 5, 6]
    first, same, other = client_hashes(keys, client_masks(32, 64)).tolist()
    assert first == same != other


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        ((32, 64), ["ffffffffffffffffffffffffffffffff", "ffffffffffffffff" + 16 * "0"]),
        ((24, 56), ["ffffffffffffffffffffffffffffff00", "ffffffffffffff" + 18 * "0"]),
        ((1, 1), ["ffffffffffffffffffffffff80000000", "80" + 30 * "0"]),
        ((32, 128), ["ff" * 16, "ff" * 16]),
    ],
)
def test_the_masks_have_the_first_bits(bits: tuple[int, int], expected: list[str]) -> None:
    """The prefix of an IPv4 address follows the 96 bits of ::ffff:0:0."""
    masks = client_masks(*bits)
    shown = [np.array(each, np.uint64).tobytes().hex() for each in masks]
    assert shown == expected


def test_the_default_prefix_of_ipv6_joins_the_addresses_of_a_host() -> None:
    """A host chooses the low 64 bits of its address."""
    keys = keys_of("2001:db8:1:2::1", "2001:db8:1:2:ffff::7", "2001:db8:1:3::1")
    first, same, other = client_hashes(keys, client_masks(32, 64)).tolist()
    assert first == same != other


@given(st.lists(st.integers(0, 2**64 - 1)), st.lists(st.integers(0, 2**64 - 1)), st.data())
def test_new_hashes_are_found(
    some: list[int], known: list[int], data: st.DataObject
) -> None:
    """A hash that only has the last bits of a known one is new."""
    for each in data.draw(st.lists(st.sampled_from(some))) if some else ():
        known = [*known, each, each ^ 1 << FILTER_BITS]
    is_new = are_new(np.array(some, np.uint64), np.array(known, np.uint64))
    assert is_new.tolist() == [each not in known for each in some]
