# SPDX-License-Identifier: GPL-3.0-only
"""Downloads and unpacks the kernels of Debian's releases, and prepares them for booting."""

import hashlib
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.vm import CACHE, HERE, VmError
from tests.vm.apt import Apt

MODULES = (
    "virtio_pci",
    "virtio_blk",
    "virtio_rng",
    "9p",
    "9pnet_virtio",
    "ext4",
    "overlay",
)
"""Kernel modules that a guest requires before it has its root file system."""

INIT = HERE / "init"


@dataclass(frozen=True)
class Kernel:
    """A kernel to test the exporter with."""

    name: str
    """The name of the kernel in docs/kernels.md."""
    suites: tuple[str, ...]
    """The Debian release that has this kernel."""


KERNELS = (
    Kernel("5.10", ("bullseye", "bullseye-security")),
    Kernel("6.1", ("bookworm", "bookworm-security")),
    Kernel("6.12", ("bookworm-backports",)),
    Kernel("7", ("trixie-backports",)),
)
"""The newest kernel of each of these suites; of the last suite the newest 7.x."""


@dataclass(frozen=True)
class Unpacked:
    """The files of a kernel for qemu."""

    image: Path
    initramfs: Path
    modules: Path
    """Directory to mount at /usr/lib/modules."""


def fetch(kernel: Kernel) -> Unpacked:
    """Return the newest kernel of its suites; download it unless it is in the cache.

    Raises:
        VmError: it cannot be downloaded; the message has the reason.
    """
    try:
        apt = Apt(CACHE / "apt" / kernel.name, *kernel.suites)
        package = _package(apt)
        tree = CACHE / "kernels" / kernel.name / f"{package}_{apt.version(package)}"
        if not tree.exists():
            _unpack(apt, package, tree)
    except VmError as error:
        raise VmError(f"kernel {kernel.name} cannot be downloaded: {error}") from error
    modules = tree / "usr/lib/modules"
    (release,) = (each.name for each in modules.iterdir())
    return Unpacked(_image(tree), _initramfs(tree, release), modules)


def _package(apt: Apt) -> str:
    """Return the package with a version in its name that linux-image-amd64 depends on."""
    found = [
        each
        for each in apt.dependencies("linux-image-amd64")
        if each.startswith("linux-image-")
    ]
    if len(found) != 1:
        raise VmError(f"linux-image-amd64 depends on {found or 'nothing'}")
    return found[0]


def _unpack(apt: Apt, package: str, tree: Path) -> None:
    """Unpack image and modules, which are separate packages since Linux 7, without
    headers."""
    for old in tree.parent.glob("*"):
        shutil.rmtree(old)
    release = package.removeprefix("linux-image-")
    parts = [each for each in apt.dependencies(package) if each.endswith(release)]
    new = tree.with_name(f"{tree.name}.new")
    apt.unpack([package, *parts], new)
    if (new / "lib").is_dir():  # until Debian 12
        (new / "usr").mkdir(exist_ok=True)
        shutil.copytree(new / "lib", new / "usr/lib", dirs_exist_ok=True)
        shutil.rmtree(new / "lib")
    (new / "lib").symlink_to("usr/lib")  # depmod and modprobe search there
    _run("depmod", "-b", new, release)
    new.rename(tree)


def _image(tree: Path) -> Path:
    found = [*tree.glob("boot/vmlinuz-*"), *tree.glob("usr/lib/modules/*/vmlinuz")]
    if not found:
        raise VmError(f"there is no vmlinuz in {tree}")
    return found[0]


def _initramfs(tree: Path, release: str) -> Path:
    """Build the initramfs of a shell, `MODULES` and `INIT`, if one of these has changed."""
    made_from = hashlib.sha256(INIT.read_bytes() + " ".join(MODULES).encode()).hexdigest()
    archive = tree / f"initramfs-{made_from[:16]}.cpio"
    if archive.exists():
        return archive
    root = tree / "initramfs"
    shutil.rmtree(root, ignore_errors=True)
    for directory in ("bin", "modules", "proc", "sys", "dev", "lower", "upper", "root"):
        (root / directory).mkdir(parents=True)
    shutil.copy(_busybox(), root / "bin/busybox")
    shutil.copy(INIT, root / "init")
    for number, module in enumerate(_with_dependencies(tree, release)):
        # Without compression, because not every kernel supports it.
        name = f"{number:03}-{module.name.removesuffix('.xz')}"
        content = (
            module.read_bytes() if module.suffix != ".xz" else _run("xz", "-dc", module)
        )
        (root / "modules" / name).write_bytes(content)
    files = "\0".join(str(each.relative_to(root)) for each in sorted(root.rglob("*")))
    packed = subprocess.run(
        ["cpio", "--create", "--null", "--format=newc", "--quiet"],
        cwd=root,
        input=files.encode(),
        stdout=subprocess.PIPE,
        check=True,
    )
    archive.write_bytes(packed.stdout)
    return archive


def _busybox() -> str:
    found = shutil.which("busybox")
    if not found:
        raise VmError("busybox is missing")
    return found


def _with_dependencies(tree: Path, release: str) -> Iterator[Path]:
    """Return the files of `MODULES` and of their dependencies, in loading order."""
    seen = set()
    for module in MODULES:
        shown = _run("modprobe", "-d", tree, "-S", release, "--show-depends", module)
        for line in shown.decode().splitlines():
            deed, _, path = line.partition(" ")
            # otherwise it is built into the kernel
            if deed == "insmod" and path not in seen:
                seen.add(path)
                yield Path(path.strip())


def _run(*command: str | Path) -> bytes:
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        raise VmError(f"{command[0]}: {done.stderr.decode().strip()}")
    return done.stdout
