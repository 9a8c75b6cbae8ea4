# SPDX-License-Identifier: GPL-3.0-only
"""Writes a bill of materials of the running exporter, in the format of CycloneDX 1.6.

Versions and hashes come from the lock file, licences and dependencies from the packages
that are installed here. The bill has no versions of the distribution's packages, because
these differ between hosts. The same tree gives the same bytes.
"""

import os
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import Distribution, distribution
from pathlib import Path
from uuid import NAMESPACE_URL, uuid5

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import (
    ExternalReference,
    ExternalReferenceType,
    HashAlgorithm,
    HashType,
    XsUri,
)
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentScope, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
LOCK = ROOT / "deploy" / "lock" / "run.txt"

DISTRIBUTIONS = {
    "cpython": ("python", "python3"),
    "bcc": ("iovisor", "python3-bpfcc or python3-bcc"),
    "libbpf": ("libbpf", "libbpf1 or libbpf, which BCC needs"),
    "libseccomp": ("seccomp", "libseccomp2 or libseccomp"),
}
"""Components from the distribution: their supplier and the names of their packages."""


@dataclass(frozen=True)
class Locked:
    """A requirement in a lock file."""

    requirement: Requirement
    sha256: tuple[str, ...]
    """The hash of each file that may be installed for it."""

    @property
    def name(self) -> str:
        return self.requirement.name

    @property
    def version(self) -> str:
        (specifier,) = self.requirement.specifier
        return specifier.version


def read_lock(path: Path) -> Iterator[Locked]:
    """Yield the requirements in a file of deploy/lock."""
    text = path.read_text().replace("\\\n", " ")
    for line in text.splitlines():
        if not line.startswith("#"):
            requirement, *hashes = line.split(" --hash=sha256:")
            yield Locked(Requirement(requirement), tuple(map(str.strip, hashes)))


def make_bom(epoch_s: int) -> Bom:
    """Return the bill of materials of this tree, as of a time.

    Raises:
        importlib.metadata.PackageNotFoundError: the exporter is not installed here.
    """
    described = tomllib.loads((ROOT / "pyproject.toml").read_text())
    exporter = _exporter(described["project"])
    components = {each.name: _component(each) for each in read_lock(LOCK)}
    for builder in map(Requirement, described["build-system"]["requires"]):
        components[builder.name].scope = ComponentScope.EXCLUDED
    others = [_of_distribution(each) for each in DISTRIBUTIONS]
    bom = Bom(
        components=[*components.values(), *others],
        serial_number=uuid5(NAMESPACE_URL, f"{exporter.purl}#{LOCK.read_text()}"),
    )
    bom.metadata.component = exporter
    bom.metadata.timestamp = datetime.fromtimestamp(epoch_s, UTC)
    bom.register_dependency(exporter, others)
    for component in (exporter, *components.values()):
        needed = _needed_by(distribution(component.name))
        bom.register_dependency(component, [components[each] for each in needed])
    return bom


def _exporter(project: dict[str, str]) -> Component:
    purl = PackageURL("pypi", None, project["name"], project["version"])
    return Component(
        type=ComponentType.APPLICATION,
        name=project["name"],
        version=project["version"],
        description=project["description"],
        licenses=[LicenseFactory().make_from_string(project["license"])],
        purl=purl,
        bom_ref=str(purl),
    )


def _component(locked: Locked) -> Component:
    purl = PackageURL("pypi", None, locked.name, locked.version)
    files = ExternalReference(
        type=ExternalReferenceType.DISTRIBUTION,
        url=XsUri(str(purl)),
        comment="any of the files that may be installed",
        hashes=[
            HashType(alg=HashAlgorithm.SHA_256, content=each) for each in locked.sha256
        ],
    )
    return Component(
        type=ComponentType.LIBRARY,
        name=locked.name,
        version=locked.version,
        licenses=[LicenseFactory().make_from_string(_license(distribution(locked.name)))],
        purl=purl,
        bom_ref=str(purl),
        external_references=[files],
    )


def _of_distribution(name: str) -> Component:
    maker, packages = DISTRIBUTIONS[name]
    purl = PackageURL("github", maker, name)
    return Component(
        type=ComponentType.LIBRARY,
        name=name,
        description=f"the distribution's, in its version: {packages}",
        purl=purl,
        bom_ref=str(purl),
    )


def _license(installed: Distribution) -> str:
    """Return the licence in a package's core metadata, as an SPDX expression or a text."""
    said = installed.metadata
    return said["License-Expression"] or said["License"]


def _needed_by(installed: Distribution) -> Iterator[str]:
    for each in map(Requirement, installed.requires or ()):
        if each.marker is None or each.marker.evaluate({"extra": ""}):
            yield canonicalize_name(each.name)


if __name__ == "__main__":
    made = make_bom(int(os.environ["SOURCE_DATE_EPOCH"]))
    sys.stdout.write(f"{JsonV1Dot6(made).output_as_string(indent=2)}\n")
