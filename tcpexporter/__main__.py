# SPDX-License-Identifier: GPL-3.0-only
"""Wires the modules together; signals and exit codes."""

import contextlib
import dataclasses
import logging
import os
import signal
import sys
import threading
import time
from types import FrameType

from prometheus_client import CollectorRegistry, generate_latest

from tcpexporter import (
    confinement,
    foreign,
    memory,
    namespaces,
    pins,
    privileges,
    server,
    sizing,
    version,
)
from tcpexporter.collector import ConnectionCollector, make_registry
from tcpexporter.connections import Direction
from tcpexporter.counting import named, select
from tcpexporter.ebpf import EbpfSource
from tcpexporter.errors import ServerError, SettingsError, SourceError, TcpExporterError
from tcpexporter.polling import PollingSource
from tcpexporter.settings import Settings, parse
from tcpexporter.sockets import open_tables
from tcpexporter.sources import Source

log = logging.getLogger("tcpexporter")

SOURCES = ("ebpf", "sock_diag", "procfs")
"""In the order in which ``--source auto`` tries them."""

DIRECTIONS = {
    "inbound": (Direction.INBOUND,),
    "outbound": (Direction.OUTBOUND,),
    "all": (Direction.INBOUND, Direction.OUTBOUND),
}


def main() -> None:
    """Run until a signal comes; exits with 0, 1 for a failure, 2 for a wrong setting."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    memory.spare()
    try:
        settings = parse(sys.argv[1:], os.environ)
        _set_up_logging(settings)
        if settings.features:
            _print_features()
        elif settings.unpin:
            pins.remove(settings.pin or pins.DEFAULT)
        else:
            _run(settings)
    except SettingsError as error:
        sys.exit(_complain(error, 2))
    except TcpExporterError as error:
        sys.exit(_complain(error, 1))
    foreign.leave(0)


def _stop(_number: int, _frame: FrameType | None) -> None:
    sys.exit(0)


def _complain(error: TcpExporterError, code: int) -> int:
    sys.stderr.write(f"tcpexporter: {error}\n")
    sys.stderr.flush()
    foreign.leave(code)
    return code


def _set_up_logging(settings: Settings) -> None:
    handler = logging.StreamHandler()
    fields = "%(asctime)s %(levelname)s %(name)s %(message)s"
    if settings.log_format == "json":
        # Only now, so that who does not ask for it does not keep it in memory: 0.2 MiB.
        from pythonjsonlogger.json import JsonFormatter  # noqa: PLC0415

        handler.setFormatter(JsonFormatter(fields))
    else:
        handler.setFormatter(
            logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
        )
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler])
    logging.getLogger("asyncio").setLevel(logging.WARNING)


def _print_features() -> None:
    # As with JsonFormatter: 0.6 MiB.
    from tcpexporter.features import Kernel, table  # noqa: PLC0415

    _print(table(Kernel()))


def _run(settings: Settings) -> None:
    with contextlib.ExitStack() as resources:
        listening = []
        if not settings.once:
            listening = server.listen(settings.listen_address, settings.listen_port)
        for each in listening:
            resources.enter_context(each)
        account = privileges.find_user(settings.user) if os.geteuid() == 0 else None
        web = None
        if settings.web_config and not settings.once:
            # As with JsonFormatter: 3 MiB.
            from tcpexporter.web import Web  # noqa: PLC0415

            web = resources.enter_context(
                contextlib.closing(Web(settings.web_config, account))
            )
        source = _open_source(settings)
        resources.callback(source.close)
        collector = _make_collector(source, settings)
        registry = make_registry(collector)
        confinement.confine(account, source.report)
        if settings.once:
            # Half a page, or none, is not to be taken for a page.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            source.start()
            _print_once(registry, settings.duration_s)
            return
        starting = _Starting(source)
        app = server.App(
            registry,
            ready=starting.awaited,
            settings=dataclasses.asdict(settings),
            version=version.VERSION,
            web=web,
        )
        try:
            if web:
                web.follow()
            starting.begin()
            server.serve(listening, app)
        finally:
            starting.raise_failure()


def _open_source(settings: Settings) -> Source:
    if settings.source != "auto":
        return _open(settings.source, settings)
    reasons = []
    for name in SOURCES:
        try:
            source = _open(name, settings)
        except SourceError as error:
            reasons.append(f"{name} does not work: {error}")
            continue
        if reasons:
            log.warning("polling %s, because %s", name, "; ".join(reasons))
        return source
    raise SourceError("; ".join(reasons))


def _open(name: str, settings: Settings) -> Source:
    if name == "ebpf":
        return EbpfSource(
            netns=settings.netns,
            max_connections=settings.max_connections
            or sizing.max_connections(sizing.read_limits()),
            reconcile_interval_s=settings.reconcile_interval_s,
            reconcile_cpu_share=settings.reconcile_cpu_percent / 100,
            pin=settings.pin,
        )
    return PollingSource(open_tables(name, settings.netns), settings.interval_s)


def _make_collector(source: Source, settings: Settings) -> ConnectionCollector:
    own_netns = namespaces.inode()
    every_netns = settings.netns == "all"
    listens_there = every_netns or own_netns == namespaces.inode(
        namespaces.find(settings.netns)
    )
    selection = select(
        settings.ports,
        tcpv6=settings.tcpv6,
        directions=DIRECTIONS[settings.direction],
        own_listener=(own_netns, settings.listen_port)
        if listens_there and not settings.once
        else None,
        by_netns=every_netns,
    )
    return ConnectionCollector(
        source,
        selection,
        duration_s=settings.duration_s,
        max_series=settings.max_series,
        named=named(settings.ports, own_netns, selection),
        names=namespaces.Names().read if every_netns else None,
        simple=settings.simple,
    )


def _print_once(registry: CollectorRegistry, duration_s: int) -> None:
    for left_s in range(duration_s, 0, -1):
        if sys.stderr.isatty():
            sys.stderr.write(f"\rwatching, {left_s} s left \033[K")
        time.sleep(1)
    if sys.stderr.isatty():
        sys.stderr.write("\r\033[K")
    _print(generate_latest(registry).decode())


def _print(page: str) -> None:
    if sys.stdout is None:
        raise ServerError("cannot write to standard output: it is closed")
    left = page.encode()
    try:
        # Not by way of its buffer: Python writes what is left there when it ends, and would
        # complain again.
        while left:
            left = left[os.write(sys.stdout.fileno(), left) :]
    except OSError as error:
        raise ServerError(f"cannot write to standard output: {error.strerror}") from error


class _Starting:
    """Learning of the connections from before, while HTTP already says so."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._awaited: str | None = "the connections from before are being read"
        self._failure: SourceError | None = None

    def begin(self) -> None:
        threading.Thread(target=self._start, name="start", daemon=True).start()

    def awaited(self) -> str | None:
        return self._awaited

    def raise_failure(self) -> None:
        if self._failure:
            raise self._failure

    def _start(self) -> None:
        try:
            self._source.start()
        except SourceError as error:
            self._failure = error
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self._awaited = None
            log.info("counting connections by %s", self._source.name)


if __name__ == "__main__":
    main()
