# SPDX-License-Identifier: GPL-3.0-only
"""Finds settings that are valid, but that the operator probably does not mean."""

from collections.abc import Iterator, Sequence

from tcpexporter.config.settings import SETTINGS, Settings, value_in
from tcpexporter.config.sources import PREFIX, VARIABLE
from tcpexporter.errors import quoted


def in_environment(settings: Settings) -> list[str]:
    """Return ``NAME=value`` of each environment variable that no flag overrides."""
    return [
        f"{each.origin.removeprefix(VARIABLE)}={each.text}"
        for each in settings.given.values()
        if each.origin.startswith(VARIABLE)
    ]


def unprefixed(settings: Settings) -> Iterator[str]:
    """Yield a sentence for each environment variable without prefix that is in force.

    Some platforms set PORT for every program.
    """
    for name, (text, origin) in settings.given.items():
        variable = origin.removeprefix(VARIABLE)
        is_chosen = variable != origin and _is_chosen(name, settings)
        if is_chosen and not variable.startswith(PREFIX):
            yield (
                f"environment variable {variable} sets {name} to {quoted(text)}: rename it"
                f" to {PREFIX}{variable}, or unset it if it is not meant for tcpexporter"
            )


def misleading(settings: Settings) -> Iterator[str]:
    """Yield a sentence for each setting that has no effect, or can only give 0."""
    has_remote_port = "remote_port" in settings.series_labels
    if settings.direction == "outbound" and settings.ports and not has_remote_port:
        yield (
            "--port selects local ports, and the kernel chooses that of an outbound"
            " connection: to count connections to a server's port, add --labels"
            " remote_port, or count inbound ones on the server"
        )
    if has_remote_port and settings.direction == "inbound":
        yield (
            "labels has remote_port, which is that of outbound connections, and these are"
            " not counted: add --direction outbound or --direction all"
        )
    if settings.listen_port in settings.ports and _counts_own_clients(settings):
        yield (
            f"--port selects {settings.listen_port}, the exporter's own port, whose inbound"
            " connections are not counted: choose another port with --listen"
        )
    if settings.once and 0 < settings.duration_s < settings.interval_s and _polls(settings):
        yield (
            "--interval is longer than --duration, so the socket tables are read only once,"
            " and closed connections are counted: choose a shorter --interval"
        )
    for reason, names in _idle(settings):
        if idle := [name for name in names if _is_chosen(name, settings)]:
            yield f"{', '.join(idle)} has no effect {reason}"


def _counts_own_clients(settings: Settings) -> bool:
    """Return whether scrapes would count, if they were not left out."""
    is_here = settings.netns == "self" and not settings.once
    return is_here and settings.direction != "outbound"


def _polls(settings: Settings) -> bool:
    return settings.source in ("sock_diag", "procfs")


def _idle(settings: Settings) -> Iterator[tuple[str, Sequence[str]]]:
    """Yield settings without effect, each time after the setting that causes this.

    The cause begins with ``with`` or ``without``.
    """
    if settings.once:
        yield "with once", ("listen", "web-config")
    if settings.simple:
        yield "with simple", ("max-series", "labels")
    if not settings.histograms:
        yield "without --histograms", ("buckets",)
    if not settings.clients:
        yield "with --clients=false", ("client-prefix",)
    if settings.source == "ebpf":
        yield "with source ebpf", ("interval",)
    if _polls(settings):
        of_ebpf = ("max-connections", "reconcile-interval", "reconcile-cpu", "pin")
        yield f"with source {settings.source}", of_ebpf
    if settings.source == "procfs":
        yield "with source procfs, which cannot identify sockets", ("state",)


def _is_chosen(name: str, settings: Settings) -> bool:
    """Return whether the value of a setting differs from its default."""
    (setting,) = (each for each in SETTINGS if each.name == name)
    return value_in(settings, setting) != value_in(Settings(), setting)
