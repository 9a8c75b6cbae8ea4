# SPDX-License-Identifier: GPL-3.0-only
"""Wires the modules together, in phases: listen, open, confine, serve.

The order is the security argument. Everything that requires root (a low port, the BPF
program, socket tables of other namespaces, files that only root can read) is opened before
`_confine` gives root up, and no client is answered before that: `_serve` comes last.
"""

import contextlib
import dataclasses
import logging
import pwd
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from prometheus_client import CollectorRegistry, generate_latest

from tcpexporter import version
from tcpexporter.collecting import Counting, open_counting
from tcpexporter.config import files
from tcpexporter.config.reader import SETTINGS, WEB_CONFIG, Message, Reader, ReaderGoneError
from tcpexporter.config.reload import Apply, Reloading, ReloadSignal
from tcpexporter.config.settings import Settings, misleading, parse, reread
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

if TYPE_CHECKING:  # imported only when it is used: see the functions that do
    from tcpexporter.metrics.output import Output
    from tcpexporter.web.guard import Guard

log = logging.getLogger("tcpexporter")


class Process(NamedTuple):
    """What this process was started with, and set up before its settings were read."""

    argv: Sequence[str]
    """Without the program's name."""
    environ: Mapping[str, str]
    supervisor: Supervisor
    reload_signal: ReloadSignal
    errors: stderr.Stderr


def run(process: Process, set_up_logging: Callable[[str, str], None]) -> None:
    """Do what the settings ask for.

    Args:
        process: see there.
        set_up_logging: called with the values of --log-level and --log-format.

    Raises:
        SettingsError: a setting is wrong.
        TcpExporterError: something does not work.
    """
    settings = parse(process.argv, process.environ)
    set_up_logging(settings.log_level, settings.log_format)
    if settings.features:
        _print_features()
    elif settings.unpin:
        pins.remove(settings.pin or pins.DEFAULT)
    else:
        _warn_of(settings)
        if settings.once:
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
    # Without handlers of ours: these would end the exporter with 0, as if it had written.
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


# --- Listen ---


def _listen(settings: Settings, resources: contextlib.ExitStack) -> list[socket.socket]:
    """The sockets that clients connect to; the kernel queues the clients until `_serve`."""
    listening = listen(settings.listen_address, settings.listen_port)
    for each in listening:
        resources.enter_context(each)
    return listening


# --- Open ---


class _Opened(NamedTuple):
    """What serving needs, opened while the process may be root."""

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

    # This reads the start time of the process in /proc/stat, which Landlock will refuse.
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
    # Imported only when it is used: it takes 3 MiB.
    from tcpexporter.web.guard import Guard  # noqa: PLC0415

    try:
        return Guard(path, reader.receive().accepted())
    except ReaderGoneError as error:
        sentence = f"{path} cannot be read: the process that reads it has failed"
        raise WebConfigError(sentence) from error


def _open_output(path: str, resources: contextlib.ExitStack) -> "Output":
    # Imported only when it is used: it takes memory.
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
    """Give up every privilege; the metrics report what is in force."""
    confined = confine.confine(account, counting.source.report, supervisor.fileno())
    registry.register(ConfinementCollector(confined))


# --- Serve ---


def _serve(
    listening: list[socket.socket], opened: _Opened, settings: Settings, process: Process
) -> None:
    """Answer HTTP until a signal arrives; meanwhile a thread starts the source."""
    source, watch = opened.counting.source, opened.counting.watch
    starting = Starting(source.start, watch)
    app = pages.App(
        opened.registry,
        ready=starting.awaited,
        settings=dataclasses.asdict(settings),
        version=version.VERSION,
        guard=opened.guard,
    )
    status = partial(_status, opened.counting)

    def is_ready() -> None:
        log.info("counting connections by %s", source.name)
        process.supervisor.tell("READY=1", f"STATUS={status()}")
        opened.reloading.follow(_appliers(opened, settings, process, app))

    async def check() -> str | None:
        # A restart by the watchdog does not help while the named namespace is missing.
        if starting.awaited() and watch and watch.trouble():
            return None
        return await app.check() or background.trouble(opened.tasks())

    try:
        starting.begin(is_ready)
        server.serve(listening, app, lambda: process.supervisor.keep(check, status))
    finally:
        process.supervisor.tell("STOPPING=1")
        starting.raise_failure()


def _appliers(
    opened: _Opened, settings: Settings, process: Process, app: pages.App
) -> dict[str, Apply]:
    """What applies a file that was read again, by the subject of the reader's message."""
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
    """Puts settings into force that were read again."""

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
            SettingsError: it cannot be used; the previous settings stay in force.
        """
        wanted = parse(self._process.argv, self._process.environ, message.accepted())
        done = reread(self._settings, wanted)
        self._settings = done.settings
        self._counting.collector.choose(self._counting.choose(done.settings))
        self._app.show_settings(dataclasses.asdict(done.settings))
        root = logging.getLogger()
        level = logging.getLevelName(done.settings.log_level.upper())
        # The lower of both levels, so that the line is logged if either allows it.
        root.setLevel(min(root.level, level))
        log.info("the settings have been read again: %s", done)
        if done.changed:
            _warn_of(done.settings)
        root.setLevel(level)


def _warn_of(settings: Settings) -> None:
    for sentence in misleading(settings):
        log.warning("%s", sentence)


def _print_features() -> None:
    # Imported only when it is used: it takes 0.6 MiB.
    from tcpexporter.ebpf.features import Kernel, table  # noqa: PLC0415

    stdout.write(table(Kernel()).encode())


def _page_after(
    duration_s: int, registry: CollectorRegistry, watch: namespaces.Watch | None
) -> bytes:
    """The exposition after connections have been watched for ``duration_s`` seconds.

    Raises:
        SourceError: the watched namespace is gone.
    """
    stderr.count_down(duration_s, "watching")
    if trouble := watch and watch.trouble():
        raise SourceError(trouble)
    return generate_latest(registry)
