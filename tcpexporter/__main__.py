# SPDX-License-Identifier: GPL-3.0-only
"""Wires the modules together; signals and exit codes."""

import contextlib
import dataclasses
import logging
import os
import pwd
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest

from tcpexporter import version
from tcpexporter.config.reader import SETTINGS, WEB_CONFIG, Reader, ReaderGoneError, Told
from tcpexporter.config.reload import Hangups, Reloading, Take
from tcpexporter.config.settings import Settings, misleading, parse, reread
from tcpexporter.connections.counting import named, select
from tcpexporter.connections.record import Direction
from tcpexporter.connections.source import Source
from tcpexporter.ebpf import pins
from tcpexporter.ebpf.source import EbpfSource
from tcpexporter.errors import (
    ServerError,
    SettingsError,
    SourceError,
    WebConfigError,
    reason,
)
from tcpexporter.host import background, namespaces, privileges, stderr
from tcpexporter.host import capacity as sizing
from tcpexporter.host import confine as confinement
from tcpexporter.host import daemon_threads as foreign
from tcpexporter.host import malloc as memory
from tcpexporter.host.background import Task
from tcpexporter.host.systemd import Supervisor
from tcpexporter.metrics.collector import (
    Choice,
    ConnectionCollector,
    make_registry,
    make_serving_registry,
)
from tcpexporter.metrics.exporter_status import ConfinementCollector
from tcpexporter.metrics.reload_status import Reloads
from tcpexporter.socket_tables.polling import PollingSource
from tcpexporter.socket_tables.tables import open_tables
from tcpexporter.web import pages, server
from tcpexporter.web.listen import listen

if TYPE_CHECKING:  # what is not asked for takes no memory
    from tcpexporter.metrics.output import Output
    from tcpexporter.socket_tables.saved_ages import State
    from tcpexporter.web.guard import Guard

log = logging.getLogger("tcpexporter")

LAST_STANDARD_STREAM = 2

LEAST_DESCRIPTORS = 64
"""What starting and serving a few clients need, with a margin; start alone needs 24."""

SOURCES = ("ebpf", "sock_diag", "procfs")
"""In the order in which ``--source auto`` tries them."""

DIRECTIONS = {
    "inbound": (Direction.INBOUND,),
    "outbound": (Direction.OUTBOUND,),
    "all": (Direction.INBOUND, Direction.OUTBOUND),
}


def main() -> None:
    """Run until a signal comes; exits with 0, 1 for a failure, 2 for a wrong setting."""
    _have_default_signals()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    _have_standard_streams()
    errors = stderr.replace()
    hangups = Hangups()
    hangups.catch()
    memory.spare()
    supervisor = Supervisor.of(os.environ)
    try:
        _require_descriptors()
        settings = parse(sys.argv[1:], os.environ)
        _set_up_logging(settings)
        if settings.features:
            _print_features()
        elif settings.unpin:
            pins.remove(settings.pin or pins.DEFAULT)
        else:
            _warn_of(settings)
            if settings.once:
                _run_once(settings, supervisor)
            else:
                _run(settings, supervisor, hangups, errors)
    except SettingsError as error:
        sys.exit(_complain(error, 2, supervisor))
    except Exception as error:
        log.debug("the exporter has failed", exc_info=error)
        sys.exit(_complain(error, 1, supervisor))
    foreign.leave(0)


def _have_default_signals() -> None:
    """Undo what the parent process has blocked or ignored.

    Where SIGCHLD is ignored the kernel does not report how a child process ended, and a
    blocked SIGTERM would not end the exporter.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _require_descriptors() -> None:
    """Raise the soft limit if it is too low.

    Raises:
        ServerError: the hard limit is too low.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= LEAST_DESCRIPTORS:
        return
    if hard < LEAST_DESCRIPTORS:
        raise ServerError(
            f"only {hard} files may be open, at least {LEAST_DESCRIPTORS} are needed: raise"
            " LimitNOFILE in the unit, or ulimit -n"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _have_standard_streams() -> None:
    """Have no socket or map where others write to: what was closed is /dev/null."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= LAST_STANDARD_STREAM:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def _stop(_number: int, _frame: FrameType | None) -> None:
    sys.exit(0)


def _complain(error: Exception, code: int, supervisor: Supervisor) -> int:
    supervisor.tell(f"STATUS={reason(error)}")
    sys.stderr.write(f"tcpexporter: {reason(error)}\n")
    foreign.leave(code)
    return code


def _set_up_logging(settings: Settings) -> None:
    # A full disk is no reason to write more.
    logging.raiseExceptions = False
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


def _warn_of(settings: Settings) -> None:
    for sentence in misleading(settings):
        log.warning("%s", sentence)


def _print_features() -> None:
    # As with JsonFormatter: 0.6 MiB.
    from tcpexporter.ebpf.features import Kernel, table  # noqa: PLC0415

    _print(table(Kernel()).encode())


def _run_once(settings: Settings, supervisor: Supervisor) -> None:
    # Half a page, or none, is not to be taken for a page.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    with contextlib.ExitStack() as resources:
        output = _open_output(settings.output) if settings.output else None
        if output:
            resources.callback(output.close)
        account = _find_account(settings)
        source, watch = _open_counted(settings, resources)
        choice = _chooser(settings, source)(settings)
        collector = _make_collector(source, settings, choice)
        registry = make_registry(collector)
        confined = confinement.confine(account, source.report, supervisor.fileno())
        registry.register(ConfinementCollector(confined))
        source.start()
        page = _page_after(settings.duration_s, registry, watch)
        if output:
            output.publish(page)
        else:
            _print(page)


def _run(
    settings: Settings, supervisor: Supervisor, hangups: Hangups, errors: stderr.Stderr
) -> None:
    with contextlib.ExitStack() as resources:
        listening = listen(settings.listen_address, settings.listen_port)
        for each in listening:
            resources.enter_context(each)
        account = _find_account(settings)
        reader = _open_reader(settings, account)
        if reader:
            resources.callback(reader.close)
        web = _make_web(settings, reader) if reader else None
        source, watch = _open_counted(settings, resources)
        choose = _chooser(settings, source)
        collector = _make_collector(source, settings, choose(settings))
        reloads = Reloads()
        reloading = Reloading(reader, hangups, supervisor, reloads)
        resources.callback(reloading.close)

        def tasks() -> list[Task]:
            return [*source.tasks(), reloading.task]

        # While /proc/stat can be read: it has the start time of the process from there.
        registry = make_serving_registry(
            collector, reloads, tasks=tasks, dropped=lambda: errors.dropped
        )
        confined = confinement.confine(account, source.report, supervisor.fileno())
        registry.register(ConfinementCollector(confined))
        starting = _Starting(source, watch)
        app = pages.App(
            registry,
            ready=starting.awaited,
            settings=dataclasses.asdict(settings),
            version=version.VERSION,
            guard=web,
        )
        following = _Following(settings, collector, choose, app)
        takers: dict[str, Take] = {SETTINGS: following.take}
        if web:
            takers[WEB_CONFIG] = lambda told: web.replace(told.accepted())
        status = partial(_status, source, collector, watch)

        def is_ready() -> None:
            supervisor.tell("READY=1", f"STATUS={status()}")
            reloading.follow(takers)

        async def check() -> str | None:
            # To be started anew does not help while there is no namespace to count.
            if starting.awaited() and watch and watch.trouble():
                return None
            return await app.check() or background.trouble(tasks())

        try:
            starting.begin(is_ready)
            server.serve(listening, app, lambda: supervisor.keep(check, status))
        finally:
            supervisor.tell("STOPPING=1")
            starting.raise_failure()


def _find_account(settings: Settings) -> pwd.struct_passwd | None:
    return privileges.find_user(settings.user) if privileges.is_root() else None


def _open_counted(
    settings: Settings, resources: contextlib.ExitStack
) -> tuple[Source, namespaces.Watch | None]:
    """Where the connections come from; what it needs is closed with ``resources``."""
    state = _open_state(settings.state) if settings.state else None
    source = _open_source(settings, state)
    resources.callback(source.close)
    if state:
        resources.callback(state.close)
    watch = _open_watch(settings, source)
    if watch:
        resources.callback(watch.close)
    return source, watch


def _open_reader(settings: Settings, account: pwd.struct_passwd | None) -> Reader | None:
    if not (settings.conf or settings.web_config):
        return None
    try:
        return Reader(
            account,
            web_config=settings.web_config,
            settings=settings.conf and str(Path(settings.conf).expanduser()),
        )
    except OSError as error:
        raise ServerError(
            f"cannot start the process that reads the configuration: {error.strerror}"
        ) from error


def _make_web(settings: Settings, reader: Reader) -> "Guard | None":
    path = settings.web_config
    if not path:
        return None
    # As with JsonFormatter: 3 MiB.
    from tcpexporter.web.guard import Guard  # noqa: PLC0415

    try:
        return Guard(path, reader.receive().accepted())
    except ReaderGoneError as error:
        raise WebConfigError(f"{path} cannot be read: its reader has failed") from error


def _open_output(path: str) -> "Output":
    # As with JsonFormatter.
    from tcpexporter.metrics.output import Output  # noqa: PLC0415

    return Output(path)


def _open_state(path: str) -> "State | None":
    # As with JsonFormatter: 0.3 MiB.
    from tcpexporter.socket_tables.saved_ages import State  # noqa: PLC0415

    return State.open(Path(path))


def _open_source(settings: Settings, state: "State | None" = None) -> Source:
    if settings.source != "auto":
        return _open(settings.source, settings, state)
    reasons = []
    for name in SOURCES:
        try:
            source = _open(name, settings, state)
        except SourceError as error:
            reasons.append(f"{name} does not work: {error}")
            continue
        if reasons:
            log.warning("polling %s, because %s", name, "; ".join(reasons))
        return source
    raise SourceError("; ".join(reasons))


def _open(name: str, settings: Settings, state: "State | None") -> Source:
    if name == "ebpf":
        return EbpfSource(
            netns=settings.netns,
            max_connections=settings.max_connections
            or sizing.max_connections(sizing.read_limits()),
            reconcile_interval_s=settings.reconcile_interval_s,
            reconcile_cpu_share=settings.reconcile_cpu_percent / 100,
            pin=settings.pin,
            state=state,
        )
    return PollingSource(open_tables(name, settings.netns), settings.interval_s, state)


def _open_watch(settings: Settings, source: Source) -> namespaces.Watch | None:
    if settings.netns in ("self", "all"):
        return None
    return namespaces.Watch(settings.netns, int(source.namespaces()[0]))


def _chooser(settings: Settings, source: Source) -> Callable[[Settings], Choice]:
    """What makes a choice of settings that differ from these in what can change."""
    own_netns = namespaces.inode()
    every_netns = settings.netns == "all"
    listens_there = settings.netns in ("self", "all") or own_netns in source.namespaces()
    own_listener = (
        (own_netns, settings.listen_port) if listens_there and not settings.once else None
    )

    def choose(chosen: Settings) -> Choice:
        selection = select(
            chosen.ports,
            tcpv6=settings.tcpv6,
            directions=DIRECTIONS[settings.direction],
            own_listener=own_listener,
            by_netns=every_netns,
        )
        return Choice(
            selection, named(chosen.ports, own_netns, selection), chosen.duration_s
        )

    return choose


def _make_collector(
    source: Source, settings: Settings, choice: Choice
) -> ConnectionCollector:
    return ConnectionCollector(
        source,
        choice,
        max_series=settings.max_series,
        names=namespaces.Names(source.namespaces).read if settings.netns == "all" else None,
        simple=settings.simple,
    )


def _status(
    source: Source, collector: ConnectionCollector, watch: namespaces.Watch | None
) -> str:
    if trouble := watch and watch.trouble():
        return trouble
    tracked = "" if collector.tracked is None else f", {collector.tracked:,} tracked"
    return f"counting connections by {source.name}{tracked}"


def _page_after(
    duration_s: int, registry: CollectorRegistry, watch: namespaces.Watch | None
) -> bytes:
    """The page when connections have been watched for so long."""
    for left_s in range(duration_s, 0, -1):
        if sys.stderr.isatty():
            sys.stderr.write(f"\rwatching, {left_s} s left \033[K")
        time.sleep(1)
    if sys.stderr.isatty():
        sys.stderr.write("\r\033[K")
    if trouble := watch and watch.trouble():
        raise SourceError(trouble)
    return generate_latest(registry)


def _print(page: bytes) -> None:
    if sys.stdout is None:
        raise ServerError("cannot write to standard output: it is closed")
    left = page
    try:
        # Not by way of its buffer: Python writes what is left there when it ends, and would
        # complain again.
        while left:
            left = left[os.write(sys.stdout.fileno(), left) :]
    except OSError as error:
        raise ServerError(f"cannot write to standard output: {error.strerror}") from error


class _Following:
    """Puts into force what was read again."""

    def __init__(
        self,
        settings: Settings,
        collector: ConnectionCollector,
        choose: Callable[[Settings], Choice],
        app: pages.App,
    ) -> None:
        self._settings = settings
        self._collector = collector
        self._choose = choose
        self._app = app

    def take(self, told: Told) -> None:
        """What a file can say against flags and environment, which are as they were."""
        done = reread(self._settings, parse(sys.argv[1:], os.environ, told.accepted()))
        self._settings = done.settings
        self._collector.choose(self._choose(done.settings))
        self._app.show_settings(dataclasses.asdict(done.settings))
        root = logging.getLogger()
        level = logging.getLevelName(done.settings.log_level.upper())
        root.setLevel(min(root.level, level))  # one of the two lets it be said
        log.info("the settings have been read again: %s", done)
        if done.changed:
            _warn_of(done.settings)
        root.setLevel(level)


class _Starting:
    """Learning of the connections from before, while HTTP already says so."""

    def __init__(self, source: Source, watch: namespaces.Watch | None = None) -> None:
        self._source = source
        self._watch = watch
        self._awaited: str | None = "the connections from before are being read"
        self._failure: Exception | None = None

    def begin(self, then: Callable[[], None]) -> None:
        """Start in a thread, which then goes on with ``then``.

        Raises:
            ThreadError: there can be no thread.
        """
        background.start(
            threading.Thread(target=self._start, args=(then,), name="start", daemon=True)
        )

    def awaited(self) -> str | None:
        """What there are no metrics for; None: there are.

        A namespace that has been made anew can only be entered by a new start.
        """
        if self._awaited or not self._watch:
            return self._awaited
        trouble = self._watch.trouble()
        if self._watch.is_replaced and not self._failure:
            self._fail(SourceError(trouble))
        return trouble

    def raise_failure(self) -> None:
        if self._failure:
            raise self._failure

    def _start(self, then: Callable[[], None]) -> None:
        try:
            self._source.start()
            self._awaited = None
            log.info("counting connections by %s", self._source.name)
            then()
        except Exception as error:
            self._fail(error)

    def _fail(self, failure: Exception) -> None:
        self._failure = failure
        os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
