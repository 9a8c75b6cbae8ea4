# SPDX-License-Identifier: GPL-3.0-only
"""The kernels of Debian's releases: fetched, unpacked, and made ready to boot."""

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
"""What a guest takes to come to its root file system."""

INIT = HERE / "init"


@dataclass(frozen=True)
class Kernel:
    """One that the exporter is tested with."""

    name: str
    """As docs/kernels.md names it."""
    suites: tuple[str, ...]
    """The release of Debian that has it."""


KERNELS = (
    Kernel("5.10", ("bullseye", "bullseye-security")),
    Kernel("6.1", ("bookworm", "bookworm-security")),
    Kernel("6.12", ("bookworm-backports",)),
    Kernel("7", ("trixie-backports",)),
)
"""The newest of each of these suites; of the last one whatever 7.x there is."""


@dataclass(frozen=True)
class Unpacked:
    """What qemu boots."""

    image: Path
    initramfs: Path
    modules: Path
    """A directory to be mounted at /usr/lib/modules."""


def fetch(kernel: Kernel) -> Unpacked:
    """The newest of its suites, from the cache unless there is a newer one now.

    Raises:
        VmError: it cannot be had; says why.
    """
    try:
        apt = Apt(CACHE / "apt" / kernel.name, *kernel.suites)
        package = _package(apt)
        tree = CACHE / "kernels" / kernel.name / f"{package}_{apt.version(package)}"
        if not tree.exists():
            _unpack(apt, package, tree)
    except VmError as error:
        raise VmError(f"kernel {kernel.name} cannot be fetched: {error}") from error
    modules = tree / "usr/lib/modules"
    (release,) = (each.name for each in modules.iterdir())
    return Unpacked(_image(tree), _initramfs(tree, release), modules)


def _package(apt: Apt) -> str:
    """The one that the package without a version stands for."""
    found = [
        each
        for each in apt.dependencies("linux-image-amd64")
        if each.startswith("linux-image-")
    ]
    if len(found) != 1:
        raise VmError(f"linux-image-amd64 stands for {found or 'nothing'}")
    return found[0]


def _unpack(apt: Apt, package: str, tree: Path) -> None:
    """Image and modules, which are packages of their own since 7; no headers."""
    for old in tree.parent.glob("*"):
        shutil.rmtree(old)
    release = package.removeprefix("linux-image-")
    parts = [each for each in apt.dependencies(package) if each.endswith(release)]
    new = tree.with_name(f"{tree.name}.new")
    apt.unpack([package, *parts], new)
    if (new / "lib").is_dir():  # before Debian 13
        (new / "usr").mkdir(exist_ok=True)
        shutil.copytree(new / "lib", new / "usr/lib", dirs_exist_ok=True)
        shutil.rmtree(new / "lib")
    (new / "lib").symlink_to("usr/lib")  # where depmod and modprobe look
    _run("depmod", "-b", new, release)
    new.rename(tree)


def _image(tree: Path) -> Path:
    found = [*tree.glob("boot/vmlinuz-*"), *tree.glob("usr/lib/modules/*/vmlinuz")]
    if not found:
        raise VmError(f"there is no vmlinuz in {tree}")
    return found[0]


def _initramfs(tree: Path, release: str) -> Path:
    """A shell, `MODULES`, and `INIT`; made anew when one of these has changed."""
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
        # Without compression, which not every kernel can undo by itself.
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
    """The files of `MODULES` in the order in which they are to be loaded."""
    seen = set()
    for module in MODULES:
        shown = _run("modprobe", "-d", tree, "-S", release, "--show-depends", module)
        for line in shown.decode().splitlines():
            deed, _, path = line.partition(" ")
            if deed == "insmod" and path not in seen:  # else it is built in
                seen.add(path)
                yield Path(path.strip())


def _run(*command: str | Path) -> bytes:
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        raise VmError(f"{command[0]}: {done.stderr.decode().strip()}")
    return done.stdout
