# SPDX-License-Identifier: GPL-3.0-only
"""A skip says why; with CI=true it is a failure."""

import os
from collections.abc import Generator

import pytest


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
