# SPDX-License-Identifier: GPL-3.0-only
"""Real shells complete the flags of tcpexporter and their values."""

import contextlib
import os
import pty
import re
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tcpexporter.config.settings import SETTINGS

FILES = Path(__file__).parents[2] / "deploy" / "completion"
FLAGS = {flag for each in SETTINGS for flag in each.flags} | {"--help", "--version"}
LIMIT_S = 20

BASH = f"""
bind 'set completion-query-items 0'
bind 'set page-completions off'
bind 'set show-all-if-ambiguous on'
bind 'set enable-bracketed-paste off'
source {FILES}/tcpexporter.bash
"""
ZSH = f"""
mkdir functions
cp {FILES}/tcpexporter.zsh functions/_tcpexporter
fpath=($PWD/functions $fpath)
autoload -Uz compinit
compinit -u -D
LISTMAX=10000
unsetopt zle_bracketed_paste prompt_sp
setopt auto_list no_list_ambiguous no_list_types
zstyle ':completion:*' verbose no
mkdir empty
cd empty
"""
SHELLS = {
    "bash": (("bash", "--norc", "--noprofile", "-i"), BASH),
    "zsh": (("zsh", "-f", "-i"), ZSH),
}
"""For each interactive shell, its command and the lines that prepare it."""


def offered(shell: str, line: str, directory: Path) -> set[str]:
    """Return the words that a shell offers or inserts for the last word of a line."""
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not on PATH: Debian has it in the package {shell}")
    if shell == "fish":
        commands = f'source {FILES}/tcpexporter.fish; complete --do-complete "{line}"'
        return {each.split("\t")[0] for each in in_fish(commands, directory).splitlines()}
    with terminal(shell, directory) as end:
        os.write(end, f"{line}\t".encode())
        printed = read(end, line)
    # Remove characters that are overwritten, and escape sequences, which move the cursor.
    shown = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", " ", re.sub(r".\x08", "", printed))
    words = re.findall(r"[\w./-]+", shown)
    return {*words} - {"ready", *line.split(), ""}


def in_fish(commands: str, directory: Path) -> str:
    environ = {"PATH": os.environ["PATH"], "HOME": str(directory), "LC_ALL": "C.UTF-8"}
    return subprocess.check_output(
        ["fish", "--no-config", "-c", commands], cwd=directory, env=environ, text=True
    )


@contextlib.contextmanager
def terminal(shell: str, directory: Path) -> Iterator[int]:
    """Start an interactive shell that reads no user's files, at a terminal of its own."""
    command, prepare = SHELLS[shell]
    end, theirs = pty.openpty()
    environ = {"PATH": os.environ["PATH"], "HOME": str(directory), "LC_ALL": "C.UTF-8"}
    running = subprocess.Popen(
        ["setsid", "--ctty", "--wait", *command],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=directory,
        env=environ | {"TERM": "vt100", "COLUMNS": "200", "LINES": "60"},
    )
    os.close(theirs)
    try:
        for line in [*prepare.split("\n"), "PS1='rea''dy '; clear"]:
            os.write(end, f"{line}\n".encode())
        read(end, "ready")
        yield end
    finally:
        os.close(end)
        running.kill()
        running.wait()


def read(end: int, expected: str) -> str:
    """Return what a shell prints until that has the expected text, and nothing follows."""
    printed, limit_s = "", time.monotonic() + LIMIT_S
    while time.monotonic() < limit_s:
        if select.select([end], [], [], 0.3)[0]:
            printed += os.read(end, 65536).decode()
        elif expected in printed:
            return printed
    raise TimeoutError(printed)


EVERY = pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])


@EVERY
def test_every_flag_is_offered(shell: str, tmp_path: Path) -> None:
    """There is no other flag."""
    assert offered(shell, "tcpexporter --", tmp_path) == FLAGS


@EVERY
@pytest.mark.parametrize("line", ["tcpexporter --source ", "tcpexporter --once --source="])
def test_the_words_of_a_value_are_offered(shell: str, line: str, tmp_path: Path) -> None:
    """They follow after a space or after "="."""
    words = {word.rpartition("=")[2] for word in offered(shell, line, tmp_path)}
    assert words - {"--source"} == {"auto", "ebpf", "sock_diag", "procfs"}


@EVERY
def test_a_path_is_completed(shell: str, tmp_path: Path) -> None:
    """It is a path of the current directory, or an absolute one."""
    (tmp_path / "the-only-file").touch()
    found = offered(shell, f"tcpexporter --web-config {tmp_path}/the", tmp_path)
    assert any(each.endswith("-only-file") for each in found)


@EVERY
def test_no_file_is_offered_for_a_number(shell: str, tmp_path: Path) -> None:
    """The port is not completed."""
    (tmp_path / "the-only-file").touch()
    assert not offered(shell, "tcpexporter --port ", tmp_path)
