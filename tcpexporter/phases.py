# SPDX-License-Identifier: GPL-3.0-only
"""Implements the phases of `startup` that require large modules: open, confine, serve."""

import asyncio
import contextlib
import logging
import pwd
import signal
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from prometheus_client import CollectorRegistry, generate_latest

from tcpexporter import version
from tcpexporter.collecting import Counting, open_counting
from tcpexporter.config import files, summary
from tcpexporter.config.misleading import misleading
from tcpexporter.config.reader import SETTINGS, WEB_CONFIG, Message, Reader, ReaderGoneError
from tcpexporter.config.reload import Apply, Reloading
from tcpexporter.config.reread import reread
from tcpexporter.config.settings import Settings, parse
from tcpexporter.ebpf.loading import Loading
from tcpexporter.errors import ServerError, SourceError, WebConfigError
from tcpexporter.host import background, namespaces, privileges, seccomp, stderr, stdout
from tcpexporter.host import confine as confinement
from tcpexporter.host.background import Task
from tcpexporter.host.starting import Starting
from tcpexporter.host.systemd import Supervisor
from tcpexporter.metrics.collector import make_registry, make_serving_registry
from tcpexporter.metrics.exporter_status import ConfinementCollector
from tcpexporter.metrics.reload_status import Reloads
from tcpexporter.web import pages, server

if TYPE_CHECKING:  # the functions that use these modules import them, to save memory
    from tcpexporter.metrics.output import Output
    from tcpexporter.startup import Process
    from tcpexporter.web.guard import Guard

log = logging.getLogger("tcpexporter")


# --- Open ---


class Opened(NamedTuple):
    """Objects that serving requires, opened while the process may be root."""

    account: pwd.struct_passwd | None
    """The user to switch to; None: the process is not root."""
    counting: Counting
    registry: CollectorRegistry
    code: bytes
    """The filter of system calls, as `seccomp.make_filter` returns it."""
    guard: "Guard | None"
    reloading: Reloading
    tasks: Callable[[], list[Task]]


def open_all(
    settings: Settings,
    process: "Process",
    loading: Loading | None,
    resources: contextlib.ExitStack,
) -> Opened:
    """Open all that serving requires, while the process may be root.

    Args:
        settings: the settings of this run.
        process: the objects that `main` made before it read the settings.
        loading: as for `open_counting`.
        resources: a stack that closes the opened objects at the end.

    Raises:
        TcpExporterError: an object cannot be opened.
    """
    account = privileges.find_account(settings.user)
    reader = open_reader(settings, account)
    if reader:
        resources.callback(reader.close)
    guard = open_guard(settings, reader) if reader else None
    code = seccomp.make_filter(process.supervisor.fileno())
    counting = open_counting(settings, resources, loading)
    reloads = Reloads()
    reloading = Reloading(reader, process.reload_signal, process.supervisor, reloads)
    resources.callback(reloading.close)

    def tasks() -> list[Task]:
        return [*counting.source.tasks(), reloading.task]

    # prometheus_client reads /proc/stat here. Landlock will refuse that after `confine`.
    registry = make_serving_registry(
        counting.collector, reloads, tasks=tasks, dropped=lambda: process.errors.dropped
    )
    return Opened(account, counting, registry, code, guard, reloading, tasks)


def open_reader(settings: Settings, account: pwd.struct_passwd | None) -> Reader | None:
    """Start the process that reads the configuration files; None: there are none.

    Raises:
        ServerError: the process cannot be started.
    """
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


def open_guard(settings: Settings, reader: Reader) -> "Guard | None":
    """Return what the web configuration requires of clients; None: there is none.

    Raises:
        WebConfigError: the file cannot be used.
    """
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


def confine(
    account: pwd.struct_passwd | None,
    counting: Counting,
    registry: CollectorRegistry,
    code: bytes,
) -> None:
    """Give up every privilege; add a metric that shows which limits are in force.

    Args:
        account: the user to switch to; None: the process is not root.
        counting: the source, which must work without privileges.
        registry: the registry to add the metric to.
        code: the filter that `seccomp.make_filter` returned.

    Raises:
        PrivilegeError: a privilege cannot be given up.
        TcpExporterError: the source does not work without privileges.
    """
    confined = confinement.confine(
        account, counting.source.report, code, cgroups=counting.cgroups
    )
    registry.register(ConfinementCollector(confined))


# --- Serve ---


def serve(
    listening: list[socket.socket], opened: Opened, settings: Settings, process: "Process"
) -> None:
    """Answer HTTP requests until a signal arrives. A thread starts the source meanwhile."""
    source, watch = opened.counting.source, opened.counting.watch
    starting = Starting(source.start, watch)
    app = pages.App(
        opened.registry,
        ready=starting.awaited,
        settings=summary.flags(settings),
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


def _log_ready(settings: Settings, opened: Opened) -> None:
    """Log what is counted, where it can be seen, and what to try next."""
    source = opened.counting.source
    found = source.report().seeded_connections
    log.info("counting %s, by %s", summary.counted(settings), source.name)
    if found is not None:
        # Also those that --direction, --port or --tcpv6 leave out of the metrics.
        sentence = "tracking %s pre-existing connections of any direction and port"
        log.info(sentence, f"{found:,}")
    has_tls = bool(opened.guard and opened.guard.tls_policy)
    url = summary.url(settings, has_tls=has_tls)
    log.info("open %s in a browser; Prometheus scrapes %smetrics", url, url)
    if advice := summary.advice(settings):
        log.info("next: %s", advice)


def _appliers(
    opened: Opened, settings: Settings, process: "Process", app: pages.App
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
        self, settings: Settings, process: "Process", counting: Counting, app: pages.App
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
        self._app.status.show_settings(summary.flags(done.settings))
        root = logging.getLogger()
        level = logging.getLevelName(done.settings.log_level.upper())
        # The lower of the old and the new log level: the line is logged if either allows
        # it.
        root.setLevel(min(root.level, level))
        log.info("settings reloaded: %s", done)
        if done.changed:
            for sentence in misleading(done.settings):
                log.warning("%s", sentence)
        root.setLevel(level)


# --- Commands without HTTP ---


def run_once(settings: Settings, supervisor: Supervisor) -> None:
    """Write the metrics once; nothing listens, so no client is served.

    Raises:
        TcpExporterError: something does not work.
    """
    # The default signal handlers: those of `serve` would exit with 0, as if the metrics had
    # been written.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    with contextlib.ExitStack() as resources:
        output = _open_output(settings.output, resources) if settings.output else None
        account = privileges.find_account(settings.user)
        counting = open_counting(settings, resources)
        registry = make_registry(counting.collector)
        code = seccomp.make_filter(supervisor.fileno())
        confine(account, counting, registry, code)
        counting.source.start()
        exposition = _exposition_after(settings.duration_s, registry, counting.watch)
        if output:
            output.publish(exposition)
        else:
            stdout.write(exposition)


def _exposition_after(
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
