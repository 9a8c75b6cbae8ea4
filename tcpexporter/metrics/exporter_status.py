# SPDX-License-Identifier: GPL-3.0-only
"""Collects metrics about the exporter itself: version, reloads, confinement, tasks."""

import platform
from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import Metric
from prometheus_client.registry import Collector

from tcpexporter import version
from tcpexporter.host.background import Task
from tcpexporter.metrics.reload_status import Reloads
from tcpexporter.metrics.series_family import info_family, labelled_family, single_family


class BuildCollector(Collector):
    """Publishes the version of tcpexporter."""

    def collect(self) -> Iterator[Metric]:
        """Yield one family, which never changes."""
        yield info_family(
            "tcpexporter_build",
            "Version of tcpexporter, the commit it was built from, and its Python version.",
            {
                "version": version.VERSION,
                "revision": version.REVISION,
                "python": platform.python_version(),
            },
        )


class ReloadCollector(Collector):
    """Publishes the result of the last reload, with names like those of Prometheus."""

    def __init__(self, reloads: Reloads) -> None:
        self._reloads = reloads

    def collect(self) -> Iterator[Metric]:
        """Yield two families, also before the first reload."""
        yield single_family(
            "tcpexporter_config_last_reload_successful",
            "Whether the last reload of the settings and the web configuration succeeded."
            " If not, the previous ones are in force.",
            "gauge",
            int(self._reloads.successful),
        )
        yield single_family(
            "tcpexporter_config_last_reload_success_timestamp_seconds",
            "Time when the last successful reload ended, or of the start.",
            "gauge",
            self._reloads.succeeded_s,
        )


class ConfinementCollector(Collector):
    """Publishes which mechanisms confine the process, as determined at the start."""

    def __init__(self, confined: Mapping[str, bool]) -> None:
        """Publish the result of `confine.confine`: whether each mechanism is in force."""
        self._confined = confined

    def collect(self) -> Iterator[Metric]:
        """Yield one family, which never changes."""
        yield labelled_family(
            "tcpexporter_confined",
            "Whether the serving process is confined by this mechanism (1) or not (0).",
            "gauge",
            "by",
            {by: int(is_in_force) for by, is_in_force in self._confined.items()},
        )


class BackgroundCollector(Collector):
    """Publishes failures of background tasks, and dropped log lines."""

    def __init__(
        self, tasks: Callable[[], Iterable[Task]], dropped: Callable[[], int]
    ) -> None:
        """Publish the results of these functions at each scrape.

        Args:
            tasks: a function that returns the background tasks.
            dropped: a function that returns the number of dropped log lines.
        """
        self._tasks = tasks
        self._dropped = dropped

    def collect(self) -> Iterator[Metric]:
        """Yield two families."""
        yield labelled_family(
            "tcpexporter_background_failures",
            "Runs of a background task that failed or exceeded their time limit.",
            "counter",
            "task",
            {task.name: task.failures() for task in self._tasks()},
        )
        yield single_family(
            "tcpexporter_dropped_log_lines",
            "Log lines dropped because standard error did not accept them at once.",
            "counter",
            self._dropped(),
        )
