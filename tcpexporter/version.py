# SPDX-License-Identifier: GPL-3.0-only
"""Which version of tcpexporter this is, and which commit it was built from."""

import json
import re
from importlib.metadata import distribution
from pathlib import Path

NAME = "tcpexporter"
STAMP = Path(__file__).with_name("revision.txt")
"""Written when a wheel is built: deploy/wheel.sh."""

UNKNOWN = "unknown"


def _find_revision() -> str:
    """The commit that was built or installed, or that the source tree is at.

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
    """The commit of a source tree's HEAD: gitrepository-layout(5).

    It reads files and does not run git: this code runs as root, and the tree and what git
    would execute for it may belong to another user.

    Raises:
        OSError: there is no repository, or the tree has no commit.
        UnicodeDecodeError: a file of it is not text.
    """
    directory = tree / ".git"
    if directory.is_file():  # of a worktree
        directory = tree / directory.read_text().removeprefix("gitdir:").strip()
    head = (directory / "HEAD").read_text().strip()
    if head.startswith("ref:"):
        head = _resolve(directory, head.removeprefix("ref:").strip())
    return head if re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", head) else UNKNOWN


def _resolve(directory: Path, ref: str) -> str:
    """The commit that a branch is at, from a file of its own or from packed-refs."""
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
