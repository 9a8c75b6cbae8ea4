# SPDX-License-Identifier: GPL-3.0-only
"""Runs child processes of a test that answer each line of JSON with a line of JSON."""

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
    """Runs a module that calls `serve`, as a process in the caller's namespace."""

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
        self.answer()  # wait until it is ready

    def ask(self, **request: Any) -> None:
        self._requests.write(json.dumps(request) + "\n")
        self._requests.flush()

    def answer(self) -> Any:
        """Return the answer to the oldest unanswered request."""
        assert select.select([self.answers], [], [], PATIENCE_S)[0], "no answer"
        line = self.answers.readline()
        assert line, "the child process has ended"
        return json.loads(line)

    def kill(self) -> None:
        """Kill the process; the kernel closes its sockets."""
        self.process.kill()
        self.process.communicate()


def serve(act: Callable[..., object]) -> None:
    """Answer every request with the result of ``act``, until standard input ends."""
    _say("ready")
    for line in sys.stdin:
        _say(act(**json.loads(line)))


def _say(answer: object) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
