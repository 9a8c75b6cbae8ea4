# SPDX-License-Identifier: GPL-3.0-only
"""The revision of a source tree, read from the files of its repository."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tcpexporter import version

Git = Callable[..., str]


@pytest.fixture(name="git")
def _git(tmp_path: Path) -> Git:
    """Runs git in a new repository with one commit."""
    who = ("-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "gc.auto=0")

    def run(*arguments: str) -> str:
        command = ["git", *who, *arguments]
        return subprocess.check_output(command, cwd=tmp_path, text=True).strip()

    run("init", "-q", "-b", "main")
    run("commit", "-q", "--allow-empty", "-m", "one")
    return run


def test_the_revision_of_a_branch_is_read(git: Git, tmp_path: Path) -> None:
    """It is in the file of the branch, or in packed-refs."""
    commit = git("rev-parse", "HEAD")
    assert version._commit_of(tmp_path) == commit
    git("pack-refs", "--all")
    assert not (tmp_path / ".git/refs/heads/main").exists()
    assert version._commit_of(tmp_path) == commit


def test_the_revision_of_a_detached_head_is_read(git: Git, tmp_path: Path) -> None:
    """The file HEAD has the commit itself."""
    git("checkout", "-q", "--detach")
    assert version._commit_of(tmp_path) == git("rev-parse", "HEAD")


def test_the_revision_of_a_worktree_is_read(git: Git, tmp_path: Path) -> None:
    """Its .git is a file, and its branches are in the main repository."""
    git("worktree", "add", "-q", str(tmp_path / "other"), "-b", "feature/x")
    assert version._commit_of(tmp_path / "other") == git("rev-parse", "feature/x")


def test_a_tree_without_a_commit_has_an_unknown_revision(tmp_path: Path) -> None:
    """One tree is not in a repository, another has a damaged HEAD."""
    with pytest.raises(OSError, match="No such file"):
        version._commit_of(tmp_path)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    with pytest.raises(OSError, match="No such file"):
        version._commit_of(tmp_path)
    (tmp_path / ".git/HEAD").write_text("damaged\n")
    assert version._commit_of(tmp_path) == "unknown"


@pytest.mark.parametrize(
    ("stamp", "expected"), [("a" * 40 + "\n", "a" * 40), (None, "unknown")]
)
def test_a_wheel_has_the_revision_of_its_build(
    stamp: str | None, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the file of the build and without a repository the revision is unknown."""
    path = tmp_path / "tcpexporter" / "revision.txt"
    path.parent.mkdir()
    if stamp:
        path.write_text(stamp)
    monkeypatch.setattr(version, "STAMP", path)
    assert version._find_revision() == expected
