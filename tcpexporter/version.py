# SPDX-License-Identifier: GPL-3.0-only
"""Which tcpexporter this is."""

import json
import os
import subprocess
from importlib.metadata import distribution
from pathlib import Path

NAME = "tcpexporter"


def _revision() -> str:
    """The commit that was installed, or that the source tree is at; else ``unknown``.

    What pip installed from a repository has it in direct_url.json:
    https://packaging.python.org/en/latest/specifications/direct-url/
    """
    origin = json.loads(distribution(NAME).read_text("direct_url.json") or "{}")
    if "vcs_info" in origin:
        return str(origin["vcs_info"]["commit_id"])
    tree = Path(__file__).parent.parent
    if not (tree / ".git").exists():
        return "unknown"
    # The tree may be another user's than root's, who runs this.
    git = ["git", "-c", f"safe.directory={tree}", "rev-parse", "HEAD"]
    # GIT_DIR, for one, may name another tree, and the current directory be deleted.
    environment = {"PATH": os.environ.get("PATH", os.defpath)}
    try:
        return subprocess.check_output(
            git, stderr=subprocess.DEVNULL, text=True, cwd=tree, env=environment
        ).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


VERSION = distribution(NAME).version
REVISION = _revision()
