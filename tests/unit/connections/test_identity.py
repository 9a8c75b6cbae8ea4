# SPDX-License-Identifier: GPL-3.0-only
"""SipHash-1-3 of many keys, compared with an implementation that follows the paper."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpexporter.connections.identity import PIECE, hashes
from tcpexporter.connections.record import CONNECTION, KEY

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
