# SPDX-License-Identifier: GPL-3.0-only
"""SipHash-1-3 of many connection keys at once: what stands for a key in every comparison.

The key of the hash is this process's own secret, so whoever chooses addresses and
ports cannot make two connections look like one. By chance two of a million have the
same 64 bits once in 37 million times.

J.-P. Aumasson, D. J. Bernstein: SipHash: a fast short-input PRF (2012).
"""

import os

import numpy as np
import numpy.typing as npt

from tcpexporter.connections.record import KEY, Records

Hashes = npt.NDArray[np.uint64]

SECRET = (int.from_bytes(os.urandom(8)), int.from_bytes(os.urandom(8)))

WORDS = KEY.itemsize // 8
PIECE = 8192
"""Keys that are hashed at once: all that this takes stays in a CPU's cache."""

_INITIAL = (0x736F6D6570736575, 0x646F72616E646F6D, 0x6C7967656E657261, 0x7465646279746573)
_LENGTH = np.uint64(KEY.itemsize << 56)


def hashes(keys: Records, secret: tuple[int, int] = SECRET) -> Hashes:
    """The hash of each of ``keys``, of dtype `KEY`; the BPF program computes the same."""
    words = np.ascontiguousarray(keys).view(np.uint64).reshape(-1, WORDS)
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
    for word in (*columns, _LENGTH):
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
