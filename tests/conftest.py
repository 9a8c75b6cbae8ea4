# SPDX-License-Identifier: GPL-3.0-only
"""Options of all tests: CI=true makes each skip a failure; --effort shortens heavy
tests."""

import os
from collections.abc import Generator

import hypothesis
import pytest

# On a busy machine any example may take long.
hypothesis.settings.register_profile("tests", deadline=None)
hypothesis.settings.load_profile("tests")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--effort",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="run this share of the operations of heavy tests (default: 1)",
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if (
        report.skipped
        and not hasattr(report, "wasxfail")
        and os.environ.get("CI") == "true"
    ):
        assert isinstance(report.longrepr, tuple)  # path, line and reason of a skip
        reason = report.longrepr[2]
        report.outcome = "failed"
        report.longrepr = f"skipped, which CI does not allow: {reason}"
    return report
