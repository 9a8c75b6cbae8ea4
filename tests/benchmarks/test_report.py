# SPDX-License-Identifier: GPL-3.0-only
"""A report can be written and read, and its tables show the measured values."""

import dataclasses
from pathlib import Path

import pytest

from tests.benchmarks import capacity, report, table
from tests.benchmarks.contenders import Count, Sample
from tests.benchmarks.exporter import NoNumberError, values
from tests.benchmarks.figures import filled
from tests.benchmarks.hold import PORTS
from tests.benchmarks.kernel import Map, Memory
from tests.benchmarks.sizes import Kept, Measured, Size, Start, checked, figure_samples

MEMORY = Memory(50 << 20, 60 << 20, 40 << 20, 10 << 20)
SETTLED = Memory(45 << 20, 60 << 20, 40 << 20, 5 << 20)
KEPT = Kept(1_000, 1_000, [Map(1, 1, 8, 16, 1_000, "0x1", 100_000)])
SIZES = [
    Size(
        1_000,
        opening_s=0.1,
        max_connections=262_144,
        contenders=[
            Measured("ebpf", [0.001, 0.002, 0.003], [0.001], MEMORY),
            Measured("without_clients", [0.001], [0.001], MEMORY),
            Measured("ss", [0.008, 0.012], [0.004], MEMORY),
            Measured("node_exporter", [0.004], [0.004], MEMORY),
            Measured("psutil", why_not="it gave no number within 60 s"),
        ],
        starts=[Start(0.5, MEMORY, SETTLED)],
        adoptions=[Start(0.6, MEMORY, SETTLED)],
        kept=KEPT,
        kept_full=KEPT,
    ),
    Size(1_000_000, why_not="memory does not suffice"),
]


@pytest.fixture(name="measured")
def _measured() -> report.Report:
    return report.Report(
        date="2026-01-02T03:04:05+00:00",
        command="python -m tests.benchmarks",
        took_s=1.0,
        machine={"cpu": "a CPU", "cores": 2, "memory_bytes": 1 << 30},
        kernel={"release": "6.18", "bpf_stats_enabled": 0},
        versions=dict.fromkeys(
            ("revision", "python", "node_exporter", "psutil", "iproute2", "bcc"), "1"
        ),
        load_average=[0.0, 1.0],
        other_exporters=0,
        tracked=1_000,
        idle_reconciliations=0,
        state_changes={"run": 9, "missed": 1, "expected": 10, "expected_of_established": 4},
        figures=filled({"scrape_s": [0.004], **figure_samples(SIZES)}),
        sizes=SIZES,
    )


def test_a_report_is_read_as_it_was_written(
    measured: report.Report, tmp_path: Path
) -> None:
    path = tmp_path / "figures.json"
    measured.write(path)
    again = report.read(path)
    assert again.sizes == measured.sizes
    assert again.figures == measured.figures


def test_the_table_shows_the_median_and_its_ratio_to_tcpexporter(
    measured: report.Report,
) -> None:
    assert "counted by awk | 10.0 ms (×5.00) |" in table.markdown(measured)


def test_the_table_shows_why_a_number_is_missing(measured: report.Report) -> None:
    shown = table.markdown(measured)
    assert "counted in Python | it gave no number within 60 s |" in shown
    assert "1,000,000 sockets: not measured, because memory does not suffice." in shown
    assert "1,000,000 pre-existing sockets | ≤ 5.00 s | not measured |" in shown


def test_the_table_marks_a_missed_target(measured: report.Report) -> None:
    figures = filled({"resident_bytes": [48 << 20], "kernel_bytes": [161.0]})
    shown = table.markdown(dataclasses.replace(measured, figures=figures))
    assert "1,000 tracked | ≤ 48.0 MiB | 48.0 MiB |" in shown
    assert "with full maps | ≤ 160 bytes | 161 bytes, missed |" in shown


def test_the_table_compares_an_adoption_with_a_first_start(
    measured: report.Report,
) -> None:
    shown = table.markdown(measured)
    assert "pinned state of this many | 600 ms |" in shown
    assert "compared with a first start | ×1.20 |" in shown
    # The peak of 60 MiB, above 45 MiB after the first reconciliation.
    assert "above that after the first reconciliation | 15.0 MiB |" in shown


def test_figures_are_ratios_to_the_median_of_what_they_are_compared_with() -> None:
    small, _ = SIZES
    million = Size(
        1_000_000,
        contenders=[
            Measured("ebpf", [0.004, 0.008], [0.008], MEMORY),
            Measured("netns_all", [0.01], [0.01], MEMORY),
            Measured("without_clients", [0.003], [0.003], MEMORY),
            Measured("with_rules", [0.07], [0.07], MEMORY),
            Measured("dump_info", [1.0, 2.0, 9.0], [1.0], MEMORY),
        ],
        starts=[Start(4.0, MEMORY, SETTLED), Start(6.0, MEMORY, SETTLED)],
        adoptions=[Start(6.5, MEMORY, SETTLED)],
    )
    samples = figure_samples([small, million])
    assert samples["scrape_node_exporter_times"] == pytest.approx([0.25, 0.5, 0.75])
    assert samples["scrape_million_times"] == pytest.approx([2, 4])
    assert samples["scrape_million_netns_all_times"] == pytest.approx([5])
    assert samples["scrape_million_without_clients_times"] == pytest.approx([3])
    assert samples["rule_million_s"] == pytest.approx([0.001])
    assert samples["ready_million_dumps_times"] == pytest.approx([2, 3])
    assert samples["adopting_million_times"] == pytest.approx([1.3])
    assert samples["adopting_bytes"] == [15 << 20]
    assert samples["resident_million_bytes"] == [45 << 20, 45 << 20]


def test_a_figure_without_something_to_compare_with_has_no_samples() -> None:
    million = Size(1_000_000, adoptions=[Start(6.5, MEMORY, SETTLED)])
    samples = figure_samples([million])
    assert samples["adopting_million_times"] == []
    assert "scrape_million_times" not in samples


def test_values_of_other_network_namespaces_are_left_out() -> None:
    page = (
        b'tcp_established_connections{netns="self",port="1"} 2\n'
        b'tcp_established_connections{netns="other",port="1"} 3\n'
    )
    assert values(page) == {("tcp_established_connections", "1"): 2}


def test_writing_replaces_the_text_between_the_markers(
    measured: report.Report, tmp_path: Path
) -> None:
    page = tmp_path / "performance.md"
    page.write_text(f"above\n\n{table.BEGIN}\nstale\n{table.END}\n\nbelow\n")
    table.write(measured, page)
    table.write(measured, page)
    text = page.read_text()
    assert text.startswith("above\n\n")
    assert text.endswith(f"{table.END}\n\nbelow\n")
    assert text.count("counted by awk") == 2  # time and CPU
    assert "stale" not in text


def test_a_file_without_markers_is_refused(measured: report.Report, tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    page.write_text("nothing\n")
    with pytest.raises(ValueError, match="does not have the lines"):
        table.write(measured, page)
    assert page.read_text() == "nothing\n"


def test_a_wrong_count_is_refused() -> None:
    right = Sample(1.0, 1.0, Count(ports=[10.0] * len(PORTS)))
    assert checked(right, 1_000) is right
    with pytest.raises(NoNumberError, match="off by 500 of 1,000"):
        checked(Sample(1.0, 1.0, Count(ports=[0.0] * len(PORTS))), 1_000)


def test_a_lack_of_memory_or_files_is_reported(tmp_path: Path) -> None:
    (tmp_path / "sys/fs").mkdir(parents=True)
    (tmp_path / "sys/fs/file-nr").write_text("1000\t0\t100000\n")
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9 kB\nMemAvailable: 2097152 kB\n")
    assert capacity.shortage(1_000, tmp_path) == ""
    assert "leaves 99,000 files for 100,000 sockets" in capacity.shortage(100_000, tmp_path)
    assert "2.0 GiB are available" in capacity.shortage(1_000_000, tmp_path)
