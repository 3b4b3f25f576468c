"""A pytest plugin that writes each result when it comes, so that tests that are cut off leave what they found.

`pytest -p benchmarks.gpu.journal --journal FILE`: a line a test, and of those that fail or are skipped, why.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

LONGEST = 3000  # characters of a failure: its end
_file: list[Path] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--journal", type=Path)


def pytest_configure(config: pytest.Config) -> None:
    journal = config.getoption("--journal")
    if journal and "PYTEST_XDIST_WORKER" not in os.environ:  # whose reports come to the main process
        _file.append(journal)


def pytest_runtest_logstart(nodeid: str) -> None:
    _write(f"STARTED {nodeid}\n")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when != "call" and report.passed:
        return
    reason = "" if report.passed else "\n" + report.longreprtext[-LONGEST:]
    printed = "".join(text for _, text in report.sections) if report.when == "call" else ""
    _write(f"{report.outcome.upper()} {report.nodeid} {report.duration:.1f} s{reason}\n{printed[-1000:]}")


def _write(text: str) -> None:
    if _file:
        with _file[0].open("a") as file:
            file.write(text)
