# SPDX-License-Identifier: GPL-3.0-only
"""The architectures of guests, and everything in which they differ."""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """The names of an architecture, and how qemu emulates a machine of it."""

    name: str
    """Debian's name, which is also the argument of ``make vm-test ARCH=``."""
    machine: str
    """The name of ``uname -m``, of qemu and of Python's wheels."""
    emulated: tuple[str, ...]
    """Options of qemu: the machine and the CPU."""
    console: str
    """The serial port that Linux writes to."""
    parameters: str = ""
    """Additional parameters of the kernel."""

    @property
    def is_native(self) -> bool:
        """Return whether the host can run its programs."""
        return self.machine == os.uname().machine


AMD64 = Architecture("amd64", "x86_64", ("-cpu", "Nehalem"), "ttyS0")
ARM64 = Architecture(
    "arm64",
    "aarch64",
    # With qemu's CPU "max" booting takes six times as long: 32 s instead of 5 s.
    ("-machine", "virt", "-cpu", "neoverse-n1"),
    "ttyAMA0",
    # Otherwise each system call empties the emulator's cache of addresses, and tests take
    # twice as long. mitigations=off is not enough: KASLR turns this isolation on.
    "kpti=off",
)
ARCHITECTURES = (AMD64, ARM64)
