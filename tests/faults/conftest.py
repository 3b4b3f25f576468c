"""What the fault tests compare with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.harness import DROPOUT, PIPELINE, Run
from tests.training.data import write_dataset


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "stdlib")


@pytest.fixture(scope="session")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """16 steps that nothing disturbs, with dropout, on two pipeline stages, saved every 4."""
    run = Run(tmp_path_factory.mktemp("whole"), data, steps=16, save_interval=4, options=[*PIPELINE, *DROPOUT])
    run.finish()
    return run
