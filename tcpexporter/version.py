# SPDX-License-Identifier: GPL-3.0-only
"""Finds the version of tcpexporter and the commit that it was built from."""

import json
import re
from importlib.metadata import distribution
from pathlib import Path

NAME = "tcpexporter"
STAMP = Path(__file__).with_name("revision.txt")
"""A file with the commit, which deploy/wheel.sh writes when it builds a wheel."""

UNKNOWN = "unknown"


def _find_revision() -> str:
    """Return the commit of the wheel, of the installed repository, or of the source tree.

    pip records the commit that it installed from a repository in direct_url.json:
    https://packaging.python.org/en/latest/specifications/direct-url/
    """
    origin = json.loads(distribution(NAME).read_text("direct_url.json") or "{}")
    if "vcs_info" in origin:
        return str(origin["vcs_info"]["commit_id"])
    try:
        if STAMP.exists():
            return STAMP.read_text().strip()
        return _commit_of(STAMP.parent.parent)
    except (OSError, UnicodeDecodeError):
        return UNKNOWN


def _commit_of(tree: Path) -> str:
    """Return the commit of a source tree's HEAD: gitrepository-layout(5).

    It reads files instead of running git. This code runs as root, and git can execute
    commands from the tree's configuration, which may belong to another user.

    Raises:
        OSError: the tree is not a git repository, or has no commit.
        UnicodeDecodeError: a file of the repository is not UTF-8.
    """
    directory = tree / ".git"
    if directory.is_file():  # in a worktree, .git is a file with the path of the directory
        directory = tree / directory.read_text().removeprefix("gitdir:").strip()
    head = (directory / "HEAD").read_text().strip()
    if head.startswith("ref:"):
        head = _resolve(directory, head.removeprefix("ref:").strip())
    return head if re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", head) else UNKNOWN


def _resolve(directory: Path, ref: str) -> str:
    """Return the commit of a branch, from the branch's own file or from packed-refs."""
    common = directory / "commondir"
    if common.exists():
        directory /= common.read_text().strip()
    branch = directory / ref
    if branch.exists():
        return branch.read_text().strip()
    lines = (line.split() for line in (directory / "packed-refs").read_text().splitlines())
    return next((line[0] for line in lines if line[1:] == [ref]), UNKNOWN)


VERSION = distribution(NAME).version
REVISION = _find_revision()
