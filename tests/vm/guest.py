# SPDX-License-Identifier: GPL-3.0-only
"""Runs a command in a guest: boots a kernel and a root image in an emulator."""

import shutil
import subprocess
from pathlib import Path

from tests.vm import HERE, VmError
from tests.vm.images import pack_tree
from tests.vm.kernels import Unpacked

SESSION = HERE / "session"
"""The init program of a guest that runs a command only."""

BOOT = HERE / "boot"
"""The init program of a guest that starts systemd and its services."""

MEMORY_MIB = 2048

APPEND = (
    "quiet loglevel=3 panic=-1 net.ifnames=0 rdinit=/init",
    # The emulator caches translated code by address: with random addresses each process
    # would be twice as slow.
    "norandmaps mitigations=off",
)

# The kernel kills the guest when this process ends: prctl(2), PR_SET_PDEATHSIG.
GUARD = ("setpriv", "--pdeathsig=KILL")

OPTIONS = (
    *("-accel", "tcg,thread=multi", "-m", str(MEMORY_MIB)),
    # With a second CPU some kernels panic now and then.
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
    """Boot a guest, run a command in /tcpexporter, and wait until it has ended.

    Args:
        kernel: The kernel to boot.
        image: The root file system, which is not changed.
        share: A directory that the guest has as /share.
        command: A command for sh(1); the source tree is in /tcpexporter.
        init: `SESSION` or `BOOT`.
        log: The file for the guest's output; None: this terminal.
        limit_s: Time limit.

    Returns:
        The command's exit code.

    Raises:
        VmError: the guest ended without an exit code of the command.
    """
    result = share / "result"
    result.unlink(missing_ok=True)
    (share / "command").write_text(command)
    shutil.copy(init, share)
    pack_tree(share / "tree.tar")
    machine = kernel.architecture
    parameters = (f"console={machine.console}", machine.parameters, *APPEND)
    arguments = [
        *(*GUARD, f"qemu-system-{machine.machine}", *machine.emulated, *OPTIONS),
        *_devices(kernel, image, share),
        *("-append", " ".join([*parameters, f"vm.init=/share/{init.name}"])),
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
