# SPDX-License-Identifier: GPL-3.0-only
"""The software bill of materials of this tree."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from deploy.sbom import DISTRIBUTIONS, LOCK, ROOT, read_lock
from tcpexporter.version import VERSION


def make(**environment: str) -> str:
    return subprocess.check_output(
        [sys.executable, "-m", "deploy.sbom"],
        cwd=ROOT,
        env=os.environ | {"SOURCE_DATE_EPOCH": "1700000000"} | environment,
        text=True,
    )


@pytest.fixture(scope="module")
def text() -> str:
    return make()


@pytest.fixture
def bom(text: str) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(text)
    return parsed


def test_the_bill_is_valid(text: str) -> None:
    """It satisfies the schema of CycloneDX, which allows no other keys."""
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None


def test_the_bill_is_of_this_version(bom: dict[str, Any]) -> None:
    """Its time is the one given to the program."""
    described = bom["metadata"]["component"]
    assert (described["name"], described["version"]) == ("tcpexporter", VERSION)
    assert bom["metadata"]["timestamp"] == "2023-11-14T22:13:20+00:00"


def test_the_bill_lists_all_locked_packages(bom: dict[str, Any]) -> None:
    """Each package has its version, every hash and a licence; there is no other package."""
    listed = {
        each["purl"]: {
            digest["content"] for digest in each["externalReferences"][0]["hashes"]
        }
        for each in bom["components"]
        if each["purl"].startswith("pkg:pypi/")
    }
    assert listed == {
        f"pkg:pypi/{each.name}@{each.version}": set(each.sha256) for each in read_lock(LOCK)
    }
    assert all(each["licenses"] for each in bom["components"] if each["purl"] in listed)


def test_the_bill_names_packages_of_the_distribution(bom: dict[str, Any]) -> None:
    """They have no version, because it depends on the host."""
    named = [each for each in bom["components"] if "version" not in each]
    assert {each["name"] for each in named} == set(DISTRIBUTIONS)


def test_the_bill_lists_dependencies(bom: dict[str, Any]) -> None:
    """Each package is a dependency of the exporter or of another package."""
    needs = {each["ref"]: each.get("dependsOn", []) for each in bom["dependencies"]}
    reached, left = set(), [bom["metadata"]["component"]["bom-ref"]]
    while left:
        reached.add(left[-1])
        left += needs[left.pop()]
    apart = [each["name"] for each in bom["components"] if each["bom-ref"] not in reached]
    assert apart == ["setuptools"]


def test_the_bill_of_the_same_tree_has_the_same_bytes(text: str, tmp_path: Path) -> None:
    """Process, time zone, home directory and hash seed differ."""
    assert make(TZ="Asia/Kolkata", HOME=str(tmp_path), PYTHONHASHSEED="7") == text
