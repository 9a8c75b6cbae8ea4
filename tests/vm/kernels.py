# SPDX-License-Identifier: GPL-3.0-only
"""Downloads and unpacks the kernels of Debian's releases, and prepares them for booting."""

import hashlib
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock

from tests.vm import CACHE, HERE, VmError
from tests.vm.apt import Apt
from tests.vm.architectures import AMD64, ARM64, Architecture

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

SHELLS = "bookworm"
"""The suite whose busybox is the shell of every initramfs."""


@dataclass(frozen=True)
class Kernel:
    """A kernel to test the exporter with."""

    name: str
    """The name of the kernel in docs/kernels.md."""
    suites: tuple[str, ...]
    """The Debian release that has this kernel."""
    architecture: Architecture = AMD64
    flavour: str = ""
    """The end of the package's name, such as -16k: a kernel with pages of 16 KiB."""

    @property
    def package(self) -> str:
        """Return the package that depends on the newest kernel."""
        return f"linux-image-{self.architecture.name}{self.flavour}"

    @property
    def cached_as(self) -> str:
        """Return the name of the kernel's files."""
        return f"{self.name}-{self.architecture.name}"


KERNELS = (
    Kernel("5.10", ("bullseye", "bullseye-security")),
    Kernel("6.1", ("bookworm", "bookworm-security")),
    Kernel("6.12", ("bookworm-backports",)),
    Kernel("7", ("trixie-backports",)),
)
"""The newest kernel of each of these suites; of the last suite the newest 7.x."""

KERNELS_ARM64 = (
    # Not bullseye-security: its list names a kernel for arm64 whose file is gone.
    Kernel("5.10", ("bullseye",), ARM64),
    *(replace(each, architecture=ARM64) for each in KERNELS[1:]),
)
PAGES_16K = replace(KERNELS_ARM64[2], name="6.12-16k", flavour="-16k")

_fetching_busybox = Lock()


@dataclass(frozen=True)
class Unpacked:
    """The files of a kernel for qemu."""

    architecture: Architecture
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
        state = CACHE / "apt" / kernel.cached_as
        apt = Apt(state, kernel.architecture, *kernel.suites)
        package = _package(apt, kernel.package)
        tree = CACHE / "kernels" / kernel.cached_as / f"{package}_{apt.version(package)}"
        if not tree.exists():
            _unpack(apt, package, tree)
        shell = _busybox(kernel.architecture)
    except VmError as error:
        raise VmError(f"kernel {kernel.name} cannot be downloaded: {error}") from error
    modules = tree / "usr/lib/modules"
    (release,) = (each.name for each in modules.iterdir())
    return Unpacked(
        kernel.architecture, _image(tree), _initramfs(tree, release, shell), modules
    )


def _package(apt: Apt, above: str) -> str:
    """Return the package with a version in its name that the package ``above`` depends
    on."""
    found = [each for each in apt.dependencies(above) if each.startswith("linux-image-")]
    if len(found) != 1:
        raise VmError(f"{above} depends on {found or 'nothing'}")
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


def _initramfs(tree: Path, release: str, shell: Path) -> Path:
    """Build the initramfs of the shell, `MODULES` and `INIT`, if one of the latter has
    changed."""
    made_from = hashlib.sha256(INIT.read_bytes() + " ".join(MODULES).encode()).hexdigest()
    archive = tree / f"initramfs-{made_from[:16]}.cpio"
    if archive.exists():
        return archive
    root = tree / "initramfs"
    shutil.rmtree(root, ignore_errors=True)
    for directory in ("bin", "modules", "proc", "sys", "dev", "lower", "upper", "root"):
        (root / directory).mkdir(parents=True)
    shutil.copy(shell, root / "bin/busybox")
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


def _busybox(architecture: Architecture) -> Path:
    """Return a statically linked shell; download it unless it is in the cache."""
    tree = CACHE / "busybox" / architecture.name
    with _fetching_busybox:
        if not tree.exists():
            apt = Apt(CACHE / "apt" / f"busybox-{architecture.name}", architecture, SHELLS)
            new = tree.with_name(f"{tree.name}.new")
            apt.unpack(["busybox-static"], new)
            new.rename(tree)
    return tree / "bin/busybox"


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
