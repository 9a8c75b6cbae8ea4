# SPDX-License-Identifier: GPL-3.0-only
"""The order of the phases, and what happens before the large modules are imported."""

import contextlib
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tcpexporter import phases, startup
from tcpexporter.config.settings import Settings
from tcpexporter.ebpf.loading import Loading
from tcpexporter.errors import LoadError, ServerError

LARGE = ("numpy", "asyncio", "prometheus_client", "pyroute2", "importlib.metadata")


def test_the_loader_starts_before_large_modules_are_imported() -> None:
    """Importing them takes as long as compiling the BPF program, at the same time."""
    program = f"import sys, tcpexporter.__main__; print({{*sys.modules}} & {{*{LARGE}}})"
    said = subprocess.check_output([sys.executable, "-c", program], text=True)
    assert said == "set()\n"


class Phases:
    """Records the phases of a start, and which loader is given to them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.order: list[str] = []
        self.given: object = None
        monkeypatch.setattr(startup, "listen", lambda *_: self._done("listen", []))
        monkeypatch.setattr(startup, "begin_loading", self.begin)
        monkeypatch.setattr(phases, "open_all", self.open_all)
        monkeypatch.setattr(phases, "confine", lambda *_: self._done("confine"))
        monkeypatch.setattr(phases, "serve", lambda *_: self._done("serve"))

    def _done(self, phase: str, result: object = None) -> object:
        self.order.append(phase)
        return result

    def begin(self, _: Settings) -> object:
        return self._done("load", SimpleNamespace(close=lambda: self._done("close")))

    def open_all(self, *given: object) -> SimpleNamespace:
        self.order.append("open")
        self.given = given[2]
        return SimpleNamespace(account=None, counting=None, registry=None, code=b"")


def run(source: str) -> None:
    startup._run(Settings(source=source), SimpleNamespace(supervisor=None))  # type: ignore[arg-type]


@pytest.mark.parametrize("source", ["auto", "ebpf"])
def test_the_program_is_loaded_when_the_port_is_bound(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Privileges are given up after all has been opened, and clients are served last."""
    started = Phases(monkeypatch)
    run(source)
    assert started.order == ["listen", "load", "open", "confine", "serve", "close"]
    assert started.given


@pytest.mark.parametrize("source", ["sock_diag", "procfs"])
def test_no_loader_starts_for_a_source_that_polls(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """These sources require neither a compiler nor privileges."""
    started = Phases(monkeypatch)
    run(source)
    assert "load" not in started.order


def test_a_taken_port_is_reported_before_the_program_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A second exporter by mistake does not change the kernel."""
    started = Phases(monkeypatch)

    def refuse(*_: object) -> None:
        raise ServerError("port 9690 is already in use")

    monkeypatch.setattr(startup, "listen", refuse)
    with pytest.raises(ServerError):
        run("ebpf")
    assert started.order == []


def test_a_loader_that_cannot_start_is_left_to_the_source(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Opening the source tries again: it reports the error, or polls instead."""
    started = Phases(monkeypatch)

    def refuse(_: Settings) -> Loading:
        raise LoadError("no process can be started")

    monkeypatch.setattr(startup, "begin_loading", refuse)
    run("auto")
    assert started.order == ["listen", "open", "confine", "serve"]
    assert started.given is None


def test_the_loader_is_closed_if_another_phase_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Then the start has failed, and nothing of it may stay in the kernel."""
    started = Phases(monkeypatch)

    def refuse(*_: object) -> None:
        raise ServerError("the configuration cannot be read")

    monkeypatch.setattr(phases, "open_all", refuse)
    with contextlib.suppress(ServerError):
        run("ebpf")
    assert started.order == ["listen", "load", "close"]
