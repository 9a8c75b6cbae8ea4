# SPDX-License-Identifier: GPL-3.0-only
"""`make release` builds all files of a release, and tags only if asked."""

import os
import subprocess
import sys
import tarfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

from tcpexporter.version import VERSION
from tests.packaging.test_wheel import copy_tree

DEBS = ["tcpexporter_debian13.deb", "tcpexporter_here.deb"]
IDENTITY = {
    f"GIT_{who}_{what}": value
    for who in ("AUTHOR", "COMMITTER")
    for what, value in (("NAME", "x"), ("EMAIL", "x@example.org"))
}


def git(tree: Path, *arguments: str) -> str:
    return subprocess.check_output(
        ["git", *arguments], cwd=tree, env=os.environ | IDENTITY, text=True
    )


def release(tree: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [tree / "deploy" / "release.sh"],
        env=os.environ | IDENTITY | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def write_script(path: Path, command: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{command}\n")
    path.chmod(0o755)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a repository of this tree. deploy/deb.sh is a stub there: see test_deb."""
    tree = tmp_path_factory.mktemp("release") / "tree"
    copy_tree(tree, mode=0o644, age_s=0, backwards=False)
    write_script(tree / ".venv/bin/python", f'exec {sys.executable} "$@"')
    stub = 'echo a package >"$1/tcpexporter_${FOR_RELEASE:-here}.deb"'
    write_script(tree / "deploy/deb.sh", stub)
    git(tree, "commit", "-qam", "stub")
    return tree


def test_a_release_without_a_tag(tree: Path) -> None:
    """All files have a checksum, and the notes are those of the unreleased version."""
    done = release(tree)
    assert done.returncode == 0, done.stderr
    dist = tree / "dist"
    assert {each.name for each in dist.iterdir()} == {
        *DEBS,
        "NOTES.md",
        "SHA256SUMS",
        "tcpexporter.cdx.json",
        f"tcpexporter-{VERSION}-py3-none-any.whl",
        f"tcpexporter-{VERSION}.tar.gz",
    }
    checked = subprocess.check_output(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=dist, text=True
    )
    assert checked.count(": OK\n") == 6
    notes = (dist / "NOTES.md").read_text()
    assert "\n## [" not in notes
    assert notes.strip() in (tree / "CHANGELOG.md").read_text()
    assert not git(tree, "tag")


def test_the_source_archive_can_be_built(tree: Path) -> None:
    """It has the tree of the commit, the metadata, and the commit for the version."""
    root = f"tcpexporter-{VERSION}"
    with tarfile.open(tree / "dist" / f"{root}.tar.gz") as packed:
        names = {each.name for each in packed.getmembers() if each.isfile()}
        metadata = packed.extractfile(f"{root}/PKG-INFO")
        revision = packed.extractfile(f"{root}/tcpexporter/revision.txt")
        assert metadata
        assert revision
        headers = HeaderParser().parsestr(metadata.read().decode())
        commit = revision.read().decode()
    assert (headers["Name"], headers["Version"]) == ("tcpexporter", VERSION)
    assert commit == git(tree, "rev-parse", "HEAD")
    tracked = {f"{root}/{each}" for each in git(tree, "ls-files").splitlines()}
    assert names == tracked | {f"{root}/PKG-INFO", f"{root}/tcpexporter/revision.txt"}


def test_a_version_without_notes_is_not_tagged(tree: Path) -> None:
    """A tree with changes is refused too."""
    done = release(tree, TAG="1")
    assert f"CHANGELOG.md has no section [{VERSION}]" in done.stderr
    assert done.returncode == 1
    changed = tree / "README.md"
    before = changed.read_text()
    changed.write_text("changed")
    assert "the tree has changes" in release(tree).stderr
    changed.write_text(before)
    assert not git(tree, "tag")


def test_a_tag_has_the_notes_of_its_version(tree: Path) -> None:
    """The headings of the notes stay, although git treats # as a comment."""
    log = tree / "CHANGELOG.md"
    entry = (
        f"## [{VERSION}] - 2026-01-01\n\n### Added\n\n- A thing.\n\n## [0.0.1]\n\n- Old.\n"
    )
    log.write_text(f"# Changelog\n\n## [Unreleased]\n\n{entry}")
    git(tree, "commit", "-qam", "notes")
    done = release(tree, TAG="1")
    assert done.returncode == 0, done.stderr
    shown = git(tree, "for-each-ref", "--format=%(contents)", f"refs/tags/v{VERSION}")
    assert shown.strip() == "### Added\n\n- A thing."


def test_a_version_is_tagged_once(tree: Path) -> None:
    """A second release with a tag builds nothing."""
    assert git(tree, "tag") == f"v{VERSION}\n"
    done = release(tree, TAG="1")
    assert done.returncode == 1
    assert f"the tag v{VERSION} exists" in done.stderr
    assert not done.stdout
