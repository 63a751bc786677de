"""A pytest plugin: every test's outcome, as it is known, into the rows of `bench.gpu`."""

from __future__ import annotations

import os

import pytest

from bench.gpu_rows import leave

_left: list[str] = []


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report):
    # Setup and teardown say something only when they go wrong or skip. With pytest-xdist the
    # workers' reports come to the controller too, which leaves them.
    if (report.when != "call" and report.passed) or "PYTEST_XDIST_WORKER" in os.environ:
        return
    _left.append(report.outcome)
    text = "" if report.passed else str(report.longrepr)[-2000:]
    leave({"test": report.nodeid, "outcome": report.outcome, "message": text})


def pytest_sessionfinish(session):
    # On a machine that can run them, a test that was skipped has proven nothing.
    if session.exitstatus == pytest.ExitCode.OK and "skipped" in _left:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
