# SPDX-License-Identifier: GPL-3.0-only
"""What came of the tests in each guest, and the file that keeps it."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypedDict
from xml.etree import ElementTree as ET


@dataclass(frozen=True)
class Guest:
    """What a guest was: see `tests.vm.facts`."""

    release: str
    version: str
    python: str
    bcc: str
    lacks: list[str]
    """The names of features that its kernel has not."""
    has_headers: bool
    has_compiler: bool


@dataclass(frozen=True)
class Outcome:
    """Of one kernel with one userland."""

    kernel: str
    """As ``make vm-test KERNEL=`` takes it."""
    userland: str
    """What all else is of."""
    seconds: float = 0.0
    """From starting the emulator until it has ended."""
    passed: int = 0
    failed: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    """The reason of each test."""
    guest: Guest | None = None
    why_not: str = ""
    """Why there is no result, or no whole one."""

    @property
    def is_good(self) -> bool:
        return bool(self.passed) and not self.failed and not self.why_not


def read_guest(path: Path) -> Guest:
    """What a guest has written of itself."""
    return Guest(**json.loads(path.read_text()))


class Counts(TypedDict):
    """Those fields of `Outcome` that pytest knows."""

    passed: int
    failed: list[str]
    skipped: dict[str, str]


def count(junit: Path) -> Counts:
    """What pytest has written in JUnit's format."""
    passed = 0
    failed: list[str] = []
    skipped: dict[str, str] = {}
    for case in ET.parse(junit).iter("testcase"):  # noqa: S314  our own guest wrote it
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
    """Keep them as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(each) for each in outcomes], indent=1) + "\n")


def read(path: Path) -> list[Outcome]:
    """What `write` has kept."""
    kept = json.loads(path.read_text())
    return [
        Outcome(**{**each, "guest": Guest(**each["guest"]) if each["guest"] else None})
        for each in kept
    ]
