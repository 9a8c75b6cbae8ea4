# SPDX-License-Identifier: GPL-3.0-only
"""The bill of materials, made from this tree."""

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


def test_it_is_valid(text: str) -> None:
    """By the schema of CycloneDX, which allows nothing but what it has."""
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None


def test_it_is_of_this_version(bom: dict[str, Any]) -> None:
    """And of the time that it was told."""
    described = bom["metadata"]["component"]
    assert (described["name"], described["version"]) == ("tcpexporter", VERSION)
    assert bom["metadata"]["timestamp"] == "2023-11-14T22:13:20+00:00"


def test_it_lists_what_is_locked(bom: dict[str, Any]) -> None:
    """Each package in its version, with every hash and a licence; and no other."""
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


def test_it_names_what_the_distribution_brings(bom: dict[str, Any]) -> None:
    """Without a version, which is the host's."""
    named = [each for each in bom["components"] if "version" not in each]
    assert {each["name"] for each in named} == set(DISTRIBUTIONS)


def test_it_tells_who_needs_whom(bom: dict[str, Any]) -> None:
    """Whatever is there is needed by the exporter or by what that needs."""
    needs = {each["ref"]: each.get("dependsOn", []) for each in bom["dependencies"]}
    reached, left = set(), [bom["metadata"]["component"]["bom-ref"]]
    while left:
        reached.add(left[-1])
        left += needs[left.pop()]
    apart = [each["name"] for each in bom["components"] if each["bom-ref"] not in reached]
    assert apart == ["setuptools"]


def test_the_same_tree_gives_the_same_bytes(text: str, tmp_path: Path) -> None:
    """In another process, with another time zone, home and order of sets."""
    assert make(TZ="Asia/Kolkata", HOME=str(tmp_path), PYTHONHASHSEED="7") == text
