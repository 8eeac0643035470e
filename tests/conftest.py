"""What holds for every test: a test that needs system packages skips where they are missing, and fails
instead of skipping where PHI3V_REQUIRE_SYSTEM=1 says that they were installed (.ci/run).
"""

import os
from collections.abc import Iterator

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Iterator[pytest.TestReport | None]:
    report = yield
    must_run = os.environ.get("PHI3V_REQUIRE_SYSTEM") == "1" and item.get_closest_marker("system") is not None
    if must_run and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} skipped, but PHI3V_REQUIRE_SYSTEM=1: {report.longrepr}"
    return report
