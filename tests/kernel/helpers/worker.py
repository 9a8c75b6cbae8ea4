# SPDX-License-Identifier: GPL-3.0-only
"""Processes of a test that do as they are asked: a line of JSON for a line of JSON."""

import json
import select
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
PATIENCE_S = 61


class Worker:
    """A module that calls `serve`, as a process in the namespace of who starts it."""

    def __init__(self, module: str, *arguments: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *map(str, arguments)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdin
        assert self.process.stdout
        self._requests = self.process.stdin
        self.answers = self.process.stdout
        self.answer()  # that it is ready

    def ask(self, **request: Any) -> None:
        self._requests.write(json.dumps(request) + "\n")
        self._requests.flush()

    def answer(self) -> Any:
        """What it says to what it was asked; each request has one."""
        assert select.select([self.answers], [], [], PATIENCE_S)[0], "it does not answer"
        line = self.answers.readline()
        assert line, "it has ended"
        return json.loads(line)

    def kill(self) -> None:
        """End it; the kernel closes what it had open."""
        self.process.kill()
        self.process.communicate()


def serve(act: Callable[..., object]) -> None:
    """Answer every request with what ``act`` makes of it, until there are no more."""
    _say("ready")
    for line in sys.stdin:
        _say(act(**json.loads(line)))


def _say(answer: object) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
