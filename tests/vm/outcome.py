# SPDX-License-Identifier: GPL-3.0-only
"""The results of the tests in each guest, and the file that contains them."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypedDict
from xml.etree import ElementTree as ET


@dataclass(frozen=True)
class Guest:
    """Facts about a guest: see `tests.vm.facts`."""

    release: str
    version: str
    python: str
    bcc: str
    lacks: list[str]
    """Names of the features that its kernel lacks."""
    has_headers: bool
    has_compiler: bool


@dataclass(frozen=True)
class Outcome:
    """The test results of one kernel with one userland."""

    kernel: str
    """The name for ``make vm-test KERNEL=``."""
    architecture: str
    """The name for ``make vm-test ARCH=``."""
    userland: str
    """The userland and the name of the tests."""
    seconds: float = 0.0
    """Time from the start of the emulator to its end."""
    passed: int = 0
    failed: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    """The reason of each skipped test."""
    guest: Guest | None = None
    why_not: str = ""
    """The reason why there is no result or only a part of it; empty if it is complete."""

    @property
    def name(self) -> str:
        return f"{self.kernel} {self.architecture} with {self.userland}"

    @property
    def is_good(self) -> bool:
        return bool(self.passed) and not self.failed and not self.why_not


def read_guest(path: Path) -> Guest:
    """Read the facts that a guest has written."""
    return Guest(**json.loads(path.read_text()))


class Counts(TypedDict):
    """The fields of `Outcome` that pytest's results have."""

    passed: int
    failed: list[str]
    skipped: dict[str, str]


def count(junit: Path) -> Counts:
    """Count the results in pytest's JUnit file."""
    passed = 0
    failed: list[str] = []
    skipped: dict[str, str] = {}
    # Our own guest wrote the file.
    for case in ET.parse(junit).iter("testcase"):  # noqa: S314
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        skip = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(name)
        elif skip is not None:
            skipped[name] = skip.get("message", "")
        else:
            passed += 1
    return Counts(passed=passed, failed=failed, skipped=skipped)


def write(outcomes: Sequence[Outcome], path: Path) -> None:
    """Write outcomes as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(each) for each in outcomes], indent=1) + "\n")


def read(path: Path) -> list[Outcome]:
    """Read the outcomes that `write` has written."""
    kept = json.loads(path.read_text())
    return [
        Outcome(**{**each, "guest": Guest(**each["guest"]) if each["guest"] else None})
        for each in kept
    ]
