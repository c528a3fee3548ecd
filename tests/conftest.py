"""What all tests share: where GPU tests are left out, and property tests that fail the same way everywhere."""

import pytest
import torch
from hypothesis import settings

# No deadline: a shared core may take its time. Derandomized: a red run can be run again.
settings.register_profile("qat", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("qat")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What tests counted (`record_property("cases", ...)`), also when they ran in several processes."""
    counted = [
        f"{report.nodeid}: {value}"
        for report in terminalreporter.stats.get("passed", [])
        for key, value in report.user_properties
        if key == "cases"
    ]
    if counted:
        terminalreporter.section("cases")
        terminalreporter.write_line("\n".join(sorted(counted)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; this machine has none")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
