"""A loss or a gradient that is not a number ends the run before it is in the weights, and so in a checkpoint.

Megatron's rerun state machine runs the iteration again, and decides by the second result (docs: its
core/rerun_state_machine.py). torchrun reports each rank's exit code, and has 1 itself.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.harness import Run, same_tensors
from tests.training.runs import tensors

NAN = float("nan")
RESUME_TO_DISAMBIGUATE, FAILED = 16, 17  # Megatron's exit codes


def assert_finite(run: Run) -> None:
    """Raises AssertionError if any checkpoint has a tensor with an entry that is not finite."""
    for checkpoint in run.checkpoints.glob("iter_*"):
        found = tensors(run.checkpoints, int(checkpoint.name[5:]))
        assert found
        assert all(tensor.isfinite().all() for tensor in found.values() if tensor.is_floating_point())


def test_not_reproducible(whole: Run, tmp_path: Path) -> None:
    """Run again, the loss is a number: the device is at fault. Nothing is saved; the last checkpoint goes on."""
    run = whole.again(tmp_path)
    launch = run.start(plant={"rank": 1, "iteration": 6, "value": NAN, "times": 1})
    assert launch.wait() and launch.exit_codes() == {FAILED}, launch.output()[-6000:]
    assert "Possible transient error" in launch.output()
    assert [step["iteration"] for step in launch.steps()] == [1, 2, 3, 4, 5]
    assert run.saved() == 4
    assert_finite(run)
    run.finish()
    assert [step["iteration"] for step in run.launches[1].steps()] == list(range(5, 17))
    assert run.values() == whole.values()
    same_tensors(run, whole)


def test_reproducible(whole: Run, tmp_path: Path) -> None:
    """Run again, the loss is infinite again: the step before is saved, for a rerun on another device."""
    run = whole.again(tmp_path)
    fault = {"rank": 1, "iteration": 6, "value": float("inf"), "times": 99}
    launch = run.start(plant=fault)
    assert launch.wait() and launch.exit_codes() == {RESUME_TO_DISAMBIGUATE}, launch.output()[-6000:]
    assert "Need to rerun on a different GPU" in launch.output()
    assert run.saved() == 5
    assert_finite(run)


@pytest.mark.slow
def test_reproducible_and_resumed(whole: Run, tmp_path: Path) -> None:
    """What a launch from that checkpoint says: nothing new on the same device; on another whether the device was at
    fault; and with --rerun-mode disabled it goes on."""
    run = whole.again(tmp_path)
    fault = {"rank": 1, "iteration": 6, "value": NAN, "times": 99}
    for expected, message, faults in (
        (RESUME_TO_DISAMBIGUATE, "Need to rerun on a different GPU", {"plant": fault}),
        (RESUME_TO_DISAMBIGUATE, "Got rescheduled on the same GPU", {"plant": fault}),
        (FAILED, "Correct result (but possible Application error)", {"plant": fault, "host": "another"}),
        (FAILED, "Possible persistent error", {"host": "another"}),
    ):
        launch = run.start(**faults)
        assert launch.wait() and launch.exit_codes() == {expected}, launch.output()[-6000:]
        assert message in launch.output()
        assert run.saved() == 5
    assert_finite(run)
    run.finish("--rerun-mode", "disabled")
    assert [step["iteration"] for step in run.launches[-1].steps()] == list(range(6, 17))
    assert run.values() == whole.values()
    same_tensors(run, whole)


def test_in_the_first_iteration(data: Path, tmp_path: Path) -> None:
    """Megatron does not look at it; the patch does."""
    run = Run(tmp_path, data, steps=3, save_interval=1, processes=1)
    launch = run.start(plant={"rank": 0, "iteration": 1, "value": "gradient", "times": 99})
    assert launch.wait() and launch.exit_codes() == {1}, launch.output()[-6000:]
    assert "found NaN in local grad norm" in launch.output()
    assert not launch.steps() and not run.saved() and not list(run.checkpoints.glob("iter_*"))
