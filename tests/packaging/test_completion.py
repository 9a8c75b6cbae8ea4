# SPDX-License-Identifier: GPL-3.0-only
"""Real shells complete the flags of tcpexporter and their values."""

import os
import pty
import re
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest

from tcpexporter.config.settings import SETTINGS

FILES = Path(__file__).parents[2] / "deploy" / "completion"
FLAGS = {flag for each in SETTINGS for flag in each.flags} | {"--help", "--version"}
LIMIT_S = 20
FILE = "the-only-file"
"""The only file in the shells' current directory."""

BASH = f"""
bind 'set completion-query-items 0'
bind 'set page-completions off'
bind 'set show-all-if-ambiguous on'
bind 'set enable-bracketed-paste off'
source {FILES}/tcpexporter.bash
"""
ZSH = f"""
mkdir ../functions
cp {FILES}/tcpexporter.zsh ../functions/_tcpexporter
fpath=($PWD/../functions $fpath)
autoload -Uz compinit
compinit -u -D
LISTMAX=10000
unsetopt zle_bracketed_paste prompt_sp
setopt auto_list no_list_ambiguous no_list_types
zstyle ':completion:*' verbose no
"""
INTERACTIVE = {
    "bash": (("bash", "--norc", "--noprofile", "-i"), BASH),
    "zsh": (("zsh", "-f", "-i"), ZSH),
}
"""For each interactive shell, its command and the lines that prepare it."""


def environment(home: Path) -> dict[str, str]:
    """Return an environment in which a shell reads no user's files."""
    return {"PATH": os.environ["PATH"], "HOME": str(home), "LC_ALL": "C.UTF-8"}


class Shell(Protocol):
    def offered(self, line: str) -> set[str]:
        """Return the words that the shell offers or inserts for the last word of a line."""


class Fish:
    """Completes a line with fish, which requires no terminal for that."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def offered(self, line: str) -> set[str]:
        commands = f'source {FILES}/tcpexporter.fish; complete --do-complete "{line}"'
        printed = subprocess.check_output(
            ["fish", "--no-config", "-c", commands],
            cwd=self.directory,
            env=environment(self.directory),
            text=True,
        )
        return {each.split("\t")[0] for each in printed.splitlines()}


class Interactive:
    """Completes a line with bash or zsh, at a terminal of its own."""

    def __init__(self, name: str, directory: Path) -> None:
        command, prepare = INTERACTIVE[name]
        self._end, theirs = pty.openpty()
        self._running = subprocess.Popen(
            ["setsid", "--ctty", "--wait", *command],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=directory,
            env=environment(directory) | {"TERM": "vt100", "COLUMNS": "200", "LINES": "60"},
        )
        os.close(theirs)
        # The function runs when the line is executed, after all completions were printed.
        self._run(f"{prepare}PS1='> '; tcpexporter() {{ echo do''ne; }}; tcpexporter")

    def offered(self, line: str) -> set[str]:
        printed = self._run(f"{line}\t")
        # Remove overwritten characters, and escape sequences, which move the cursor.
        shown = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", " ", re.sub(r".\x08", "", printed))
        return {*re.findall(r"[\w./-]+", shown)} - {"done", *line.split()}

    def close(self) -> None:
        os.close(self._end)
        self._running.kill()
        self._running.wait()

    def _run(self, lines: str) -> str:
        """Type lines; return what is printed until the last one has run."""
        os.write(self._end, f"{lines}\n".encode())
        printed, limit_s = "", time.monotonic() + LIMIT_S
        while "done" not in printed:
            left_s = max(0, limit_s - time.monotonic())
            if not select.select([self._end], [], [], left_s)[0]:
                raise TimeoutError(printed)
            printed += os.read(self._end, 65536).decode()
        return printed


@pytest.fixture(scope="module", params=["bash", "zsh", "fish"])
def shell(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Shell]:
    if not shutil.which(request.param):
        pytest.skip(f"{request.param} is not on PATH: Debian's package has its name")
    directory = tmp_path_factory.mktemp("shell") / "home"
    directory.mkdir()
    (directory / FILE).touch()
    if request.param == "fish":
        yield Fish(directory)
        return
    running = Interactive(request.param, directory)
    yield running
    running.close()


def test_every_flag_is_offered(shell: Shell) -> None:
    """No other word is offered."""
    assert shell.offered("tcpexporter --") == FLAGS


@pytest.mark.parametrize("line", ["tcpexporter --source ", "tcpexporter --once --source="])
def test_the_words_of_a_value_are_offered(shell: Shell, line: str) -> None:
    """The value follows after a space or after "="."""
    words = {word.rpartition("=")[2] for word in shell.offered(line)}
    assert words - {"--source"} == {"auto", "ebpf", "sock_diag", "procfs"}


def test_a_path_is_completed(shell: Shell) -> None:
    """The path is that of a file in the current directory."""
    found = shell.offered("tcpexporter --web-config ./the")
    assert any(each.endswith("-only-file") for each in found)


def test_no_file_is_offered_for_a_number(shell: Shell) -> None:
    """The port is not completed."""
    assert not shell.offered("tcpexporter --port ")
