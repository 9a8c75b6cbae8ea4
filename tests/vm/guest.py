# SPDX-License-Identifier: GPL-3.0-only
"""One guest: a kernel and an image, booted under emulation, that does one thing."""

import shutil
import subprocess
from pathlib import Path

from tests.vm import HERE, VmError
from tests.vm.images import pack_tree
from tests.vm.kernels import Unpacked

SESSION = HERE / "session"
"""Nothing runs in the guest but the command."""

BOOT = HERE / "boot"
"""It is a machine with its services."""

MEMORY_MIB = 2048

APPEND = (
    "console=ttyS0 quiet loglevel=3 panic=-1 net.ifnames=0 rdinit=/init",
    # What the emulator has translated it finds again at the same address only: with
    # addresses at random each process takes twice as long.
    "norandmaps mitigations=off",
)

QEMU = (
    # However we end, it ends with us: prctl(2), PR_SET_PDEATHSIG.
    *("setpriv", "--pdeathsig=KILL"),
    "qemu-system-x86_64",
    *("-accel", "tcg,thread=multi", "-cpu", "Nehalem", "-m", str(MEMORY_MIB)),
    # A second one makes some kernels panic now and then.
    *("-smp", "1"),
    *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-net", "none"),
    *("-device", "virtio-rng-pci"),
)


def run(
    kernel: Unpacked,
    image: Path,
    share: Path,
    command: str,
    *,
    init: Path = SESSION,
    log: Path | None = None,
    limit_s: float | None = None,
) -> int:
    """Boot, have the guest do a command in /tcpexporter, and wait until it has ended.

    Args:
        kernel: what to boot.
        image: its root file system, which stays as it is.
        share: a directory that is /share in the guest.
        command: for sh(1), with the tree of the host in /tcpexporter.
        init: `SESSION` or `BOOT`.
        log: where what the guest prints goes; None: it has this terminal.
        limit_s: for how long.

    Returns:
        The command's exit code.

    Raises:
        VmError: the guest ended without one.
    """
    result = share / "result"
    result.unlink(missing_ok=True)
    (share / "command").write_text(command)
    shutil.copy(init, share)
    pack_tree(share / "tree.tar")
    arguments = [
        *QEMU,
        *_devices(kernel, image, share),
        *("-append", " ".join([*APPEND, f"vm.init=/share/{init.name}"])),
    ]
    try:
        if log is None:
            subprocess.run([*arguments, "-serial", "mon:stdio"], check=True)
        else:
            with log.open("wb") as printed:
                subprocess.run(
                    [*arguments, "-serial", "stdio", "-monitor", "none"],
                    stdin=subprocess.DEVNULL,
                    stdout=printed,
                    stderr=subprocess.STDOUT,
                    timeout=limit_s,
                    check=True,
                )
    except subprocess.TimeoutExpired:
        raise VmError(
            f"the guest has not ended within {limit_s:.0f} s, see {log}"
        ) from None
    except (OSError, subprocess.CalledProcessError) as error:
        raise VmError(f"qemu failed: {error}") from error
    if not result.exists():
        raise VmError(f"the guest ended without a result, see {log}")
    return int(result.read_text())


def _devices(kernel: Unpacked, image: Path, share: Path) -> list[str]:
    shared = "security_model=none,multidevs=remap"
    return [
        *("-kernel", str(kernel.image), "-initrd", str(kernel.initramfs)),
        *("-drive", f"file={image},if=virtio,format=raw,readonly=on"),
        *("-virtfs", f"local,path={share},mount_tag=share,{shared}"),
        *("-virtfs", f"local,path={kernel.modules},mount_tag=modules,{shared},readonly=on"),
    ]
