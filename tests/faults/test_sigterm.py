"""SIGTERM: the run saves the step that it is at, ends, and goes on bit for bit."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.harness import ASYNC, Launch, Run, same_tensors


def terminate_torchrun(launch: Launch) -> None:
    """As `kill` does; torchrun tells its ranks."""
    launch.process.terminate()


def terminate_everything(launch: Launch) -> None:
    """As a scheduler does: torchrun, the ranks, and the workers that read data for them, or save."""
    for process in [launch.process.pid, *launch.processes()]:
        os.kill(process, signal.SIGTERM)


@pytest.mark.parametrize(
    "terminate, options",
    [
        pytest.param(terminate_torchrun, ASYNC, id="torchrun", marks=pytest.mark.slow),
        pytest.param(terminate_everything, [], id="everything"),
    ],
)
def test_saves_and_goes_on(terminate: Callable[[Launch], None], options: list[str], whole: Run, tmp_path: Path) -> None:
    run = whole.again(tmp_path)
    launch = run.start(*options)
    launch.wait_for_step(6)
    terminate(launch)
    launch.wait()
    last = launch.steps()[-1]["iteration"]
    assert 6 <= last < run.steps and run.saved() == last, launch.output()[-6000:]
    run.finish()
    assert [step["iteration"] for step in run.launches[1].steps()] == list(range(last + 1, run.steps + 1))
    assert run.values() == whole.values()
    same_tensors(run, whole)
