# SPDX-License-Identifier: GPL-3.0-only
"""A skip says why; with CI=true it is a failure. Heavy tests can be made lighter."""

import os
from collections.abc import Generator

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--effort",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="do this share of the operations in tests that do very many (default: 1)",
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if (
        report.skipped
        and not hasattr(report, "wasxfail")
        and os.environ.get("CI") == "true"
    ):
        assert isinstance(report.longrepr, tuple)  # of a skip: path, line, reason
        reason = report.longrepr[2]
        report.outcome = "failed"
        report.longrepr = f"skipped, which CI does not allow: {reason}"
    return report
