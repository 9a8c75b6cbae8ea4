# SPDX-License-Identifier: GPL-3.0-only
"""Wires the modules together, in phases: listen, open, confine, serve.

The order makes the exporter secure. Everything that requires root is opened first: a port
below 1024, the BPF program, socket tables of other namespaces, files that only root can
read. Then `_confine` gives up root. The exporter answers no client before that: `_serve` is
last.
"""

import asyncio
import contextlib
import logging
import pwd
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from prometheus_client import CollectorRegistry, generate_latest

from tcpexporter import version
from tcpexporter.collecting import Counting, open_counting
from tcpexporter.config import files, summary
from tcpexporter.config.reader import SETTINGS, WEB_CONFIG, Message, Reader, ReaderGoneError
from tcpexporter.config.reload import Apply, Reloading, ReloadSignal
from tcpexporter.config.reread import reread
from tcpexporter.config.settings import Settings, in_environment, misleading, parse
from tcpexporter.ebpf import pins
from tcpexporter.errors import ServerError, SourceError, WebConfigError
from tcpexporter.host import (
    background,
    confine,
    namespaces,
    privileges,
    stderr,
    stdout,
)
from tcpexporter.host.background import Task
from tcpexporter.host.starting import Starting
from tcpexporter.host.systemd import Supervisor
from tcpexporter.metrics.collector import (
    make_registry,
    make_serving_registry,
)
from tcpexporter.metrics.exporter_status import ConfinementCollector
from tcpexporter.metrics.reload_status import Reloads
from tcpexporter.web import pages, server
from tcpexporter.web.listen import listen

if TYPE_CHECKING:  # the functions that use these modules import them, to save memory
    from tcpexporter.metrics.output import Output
    from tcpexporter.web.guard import Guard

log = logging.getLogger("tcpexporter")


class Process(NamedTuple):
    """Objects that `main` makes before the settings are read."""

    argv: Sequence[str]
    """The arguments, without the program's name."""
    environ: Mapping[str, str]
    supervisor: Supervisor
    reload_signal: ReloadSignal
    errors: stderr.Stderr


def run(process: Process, set_up_logging: Callable[[str, str], None]) -> None:
    """Serve the metrics, or run the command that the settings select.

    Args:
        process: the arguments, the environment, and objects made before start-up.
        set_up_logging: called with the values of --log-level and --log-format.

    Raises:
        SettingsError: a setting is invalid.
        TcpExporterError: a part of the exporter cannot start, or has failed.
    """
    settings = parse(process.argv, process.environ)
    set_up_logging(settings.log_level, settings.log_format)
    if settings.features:
        _print_features()
    elif settings.unpin:
        pins.remove(settings.pin or pins.DEFAULT)
    else:
        _log_settings(settings, process)
        if settings.check:
            _check(settings)
        elif settings.once:
            _run_once(settings, process.supervisor)
        else:
            _run(settings, process)


def _run(settings: Settings, process: Process) -> None:
    """Serve until a signal arrives."""
    with contextlib.ExitStack() as resources:
        listening = _listen(settings, resources)
        opened = _open(settings, process, resources)
        _confine(opened.account, opened.counting, opened.registry, process.supervisor)
        _serve(listening, opened, settings, process)


def _run_once(settings: Settings, supervisor: Supervisor) -> None:
    """Write the metrics once; nothing listens, so no client is served."""
    # The default signal handlers: those of `_run` would exit with 0, as if the metrics had
    # been written.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    with contextlib.ExitStack() as resources:
        output = _open_output(settings.output, resources) if settings.output else None
        account = privileges.find_account(settings.user)
        counting = open_counting(settings, resources)
        registry = make_registry(counting.collector)
        _confine(account, counting, registry, supervisor)
        counting.source.start()
        page = _page_after(settings.duration_s, registry, counting.watch)
        if output:
            output.publish(page)
        else:
            stdout.write(page)


def _check(settings: Settings) -> None:
    """Print what would run on this host, without disturbing an exporter that runs.

    Nothing listens, nothing is pinned, and the file of --state is not opened.

    Raises:
        TcpExporterError: the exporter would not start.
    """
    tried = replace(settings, pin=None, state=None)
    with contextlib.ExitStack() as resources:
        account = privileges.find_account(tried.user)
        reader = _open_reader(tried, account)
        if reader:
            resources.callback(reader.close)
        guard = _open_guard(tried, reader) if reader else None
        source = open_counting(tried, resources).source
        has_tls = bool(guard and guard.tls_policy)
        stdout.write(
            f"would count {summary.counted(settings)}, by {source.name}\n"
            f"would serve {summary.url(settings, has_tls=has_tls)}\n".encode()
        )


# --- Listen ---


def _listen(settings: Settings, resources: contextlib.ExitStack) -> list[socket.socket]:
    """Return the listening sockets; the kernel queues clients until `_serve`."""
    listening = listen(settings.listen_address, settings.listen_port)
    for each in listening:
        resources.enter_context(each)
    return listening


# --- Open ---


class _Opened(NamedTuple):
    """Objects that serving requires, opened while the process may be root."""

    account: pwd.struct_passwd | None
    """The user to switch to; None: the process is not root."""
    counting: Counting
    registry: CollectorRegistry
    guard: "Guard | None"
    reloading: Reloading
    tasks: Callable[[], list[Task]]


def _open(settings: Settings, process: Process, resources: contextlib.ExitStack) -> _Opened:
    account = privileges.find_account(settings.user)
    reader = _open_reader(settings, account)
    if reader:
        resources.callback(reader.close)
    guard = _open_guard(settings, reader) if reader else None
    counting = open_counting(settings, resources)
    reloads = Reloads()
    reloading = Reloading(reader, process.reload_signal, process.supervisor, reloads)
    resources.callback(reloading.close)

    def tasks() -> list[Task]:
        return [*counting.source.tasks(), reloading.task]

    # prometheus_client reads /proc/stat here. Landlock will refuse that after `_confine`.
    registry = make_serving_registry(
        counting.collector, reloads, tasks=tasks, dropped=lambda: process.errors.dropped
    )
    return _Opened(account, counting, registry, guard, reloading, tasks)


def _open_reader(settings: Settings, account: pwd.struct_passwd | None) -> Reader | None:
    if not (settings.conf or settings.web_config):
        return None
    try:
        return Reader(
            account,
            web_config=settings.web_config,
            settings=settings.conf and str(files.expanded(settings.conf)),
        )
    except OSError as error:
        raise ServerError(
            f"cannot start the process that reads the configuration: {error.strerror}"
        ) from error


def _open_guard(settings: Settings, reader: Reader) -> "Guard | None":
    path = settings.web_config
    if not path:
        return None
    # Imported only when it is used: it uses 3 MiB of memory.
    from tcpexporter.web.guard import Guard  # noqa: PLC0415

    try:
        return Guard(path, reader.receive().accepted())
    except ReaderGoneError as error:
        sentence = f"{path} cannot be read: the process that reads it has failed"
        raise WebConfigError(sentence) from error


def _open_output(path: str, resources: contextlib.ExitStack) -> "Output":
    # Imported only when it is used, to save memory.
    from tcpexporter.metrics.output import Output  # noqa: PLC0415

    output = Output(path)
    resources.callback(output.close)
    return output


# --- Confine ---


def _confine(
    account: pwd.struct_passwd | None,
    counting: Counting,
    registry: CollectorRegistry,
    supervisor: Supervisor,
) -> None:
    """Give up every privilege; add a metric that shows which limits are in force."""
    confined = confine.confine(
        account, counting.source.report, supervisor.fileno(), cgroups=counting.cgroups
    )
    registry.register(ConfinementCollector(confined))


# --- Serve ---


def _serve(
    listening: list[socket.socket], opened: _Opened, settings: Settings, process: Process
) -> None:
    """Answer HTTP requests until a signal arrives. A thread starts the source meanwhile."""
    source, watch = opened.counting.source, opened.counting.watch
    starting = Starting(source.start, watch)
    app = pages.App(
        opened.registry,
        ready=starting.awaited,
        settings=vars(settings),
        version=version.VERSION,
        guard=opened.guard,
    )
    status = partial(_status, opened.counting)

    def is_ready() -> None:
        _log_ready(settings, opened)
        process.supervisor.tell("READY=1", f"STATUS={status()}")
        opened.reloading.follow(_appliers(opened, settings, process, app))

    async def check() -> str | None:
        # While the namespace is missing, the watchdog must not restart the exporter: the
        # new start would fail too.
        if starting.awaited() and watch and watch.trouble():
            return None
        return await app.check() or background.trouble(opened.tasks())

    async def keep() -> None:
        await asyncio.gather(
            process.supervisor.keep(check, status),
            app.status.keep_sampling(lambda: starting.awaited() is None),
        )

    began_s = time.monotonic()
    try:
        starting.begin(is_ready)
        received = server.serve(listening, app, keep)
    finally:
        process.supervisor.tell("STOPPING=1")
        starting.raise_failure()
    served = timedelta(seconds=round(time.monotonic() - began_s))
    log.info("stopped by %s after %s", received.name, served)


def _log_ready(settings: Settings, opened: _Opened) -> None:
    """Log what is counted, where it can be seen, and what to try next."""
    source = opened.counting.source
    found = source.report().seeded_connections
    more = "" if found is None else f"; {found:,} existed before"
    log.info("counting %s, by %s%s", summary.counted(settings), source.name, more)
    has_tls = bool(opened.guard and opened.guard.tls_policy)
    url = summary.url(settings, has_tls=has_tls)
    log.info("open %s in a browser; Prometheus scrapes %smetrics", url, url)
    if advice := summary.advice(settings):
        log.info("next: %s", advice)


def _appliers(
    opened: _Opened, settings: Settings, process: Process, app: pages.App
) -> dict[str, Apply]:
    """Return the function that applies each kind of message from the reader."""
    apply = _SettingsReload(settings, process, opened.counting, app).apply
    appliers: dict[str, Apply] = {SETTINGS: apply}
    if guard := opened.guard:
        appliers[WEB_CONFIG] = lambda message: guard.replace(message.accepted())
    return appliers


def _status(counting: Counting) -> str:
    if trouble := counting.watch and counting.watch.trouble():
        return trouble
    known = counting.collector.tracked
    tracked = "" if known is None else f", {known:,} tracked"
    return f"counting connections by {counting.source.name}{tracked}"


class _SettingsReload:
    """Applies the settings file when it has been read again."""

    def __init__(
        self, settings: Settings, process: Process, counting: Counting, app: pages.App
    ) -> None:
        self._settings = settings
        self._process = process
        self._counting = counting
        self._app = app

    def apply(self, message: Message) -> None:
        """Combine a file's new text with the flags and the environment of the start.

        Raises:
            SettingsError: the text cannot be used; the previous settings stay in force.
        """
        wanted = parse(self._process.argv, self._process.environ, message.accepted())
        done = reread(self._settings, wanted)
        choice = self._counting.choose(done.settings)
        self._settings = done.settings
        self._counting.collector.choose(choice)
        self._app.status.show_settings(vars(done.settings))
        root = logging.getLogger()
        level = logging.getLevelName(done.settings.log_level.upper())
        # The lower of the old and the new log level: the line is logged if either allows
        # it.
        root.setLevel(min(root.level, level))
        log.info("settings reloaded: %s", done)
        if done.changed:
            _warn_of(done.settings)
        root.setLevel(level)


def _log_settings(settings: Settings, process: Process) -> None:
    """Log which settings the environment gave, and warn of those without effect."""
    if given := in_environment(process.argv, process.environ):
        # Some platforms set PORT for every program.
        log.info("settings from the environment: %s", ", ".join(given))
    _warn_of(settings)


def _warn_of(settings: Settings) -> None:
    for sentence in misleading(settings):
        log.warning("%s", sentence)


def _print_features() -> None:
    # Imported only when it is used: it uses 0.6 MiB of memory.
    from tcpexporter.ebpf.features import Kernel, table  # noqa: PLC0415

    stdout.write(table(Kernel()).encode())


def _page_after(
    duration_s: int, registry: CollectorRegistry, watch: namespaces.Watch | None
) -> bytes:
    """Watch connections for ``duration_s`` seconds, then return the exposition.

    Raises:
        SourceError: the namespace of --netns was deleted.
    """
    stderr.count_down(duration_s, "watching")
    if trouble := watch and watch.trouble():
        raise SourceError(trouble)
    return generate_latest(registry)
