"""The checks of this folder import `compare`; what they compared is printed at their end."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    import compare

    if compare.calls:
        terminalreporter.section("compared")
        terminalreporter.write_line("\n".join(compare.said()))
