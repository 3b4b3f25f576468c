"""The played schedule against closed forms."""

import pytest

from archscale_megatron.dryrun.bubble import bubble


@pytest.mark.parametrize("virtual", [1, 2, 3])
@pytest.mark.parametrize(("stages", "microbatches"), [(1, 3), (2, 2), (2, 8), (4, 4), (4, 32), (8, 16)])
def test_equal_stages(stages: int, microbatches: int, virtual: int) -> None:
    """arXiv 2104.04473, section 2.2."""
    found = bubble([2.5] * (stages * virtual), stages, microbatches)
    assert found == pytest.approx((stages - 1) / (microbatches * virtual), abs=1e-12)


@pytest.mark.parametrize("microbatches", [4, 8, 32])
def test_slow_last_stage_works_without_a_break(microbatches: int) -> None:
    """It waits for the first micro-batch's way there, and the others for the last one's way back."""
    times = [1.0, 2.0, 1.0, 6.0]
    expected = (microbatches * 6 + 4) / (microbatches * 10 / 4) - 1
    assert bubble(times, 4, microbatches) == pytest.approx(expected)


def test_slow_first_stage_waits_for_the_last_backward_pass_only() -> None:
    """Two stages of 6 and 3, two micro-batches. The first: F 0-2, F 2-4, B 5-9, B 9-13; the second: F 2-3, B 3-5,
    F 5-6, B 6-8. Ideal: 9."""
    assert bubble([6.0, 3.0], 2, 2) == pytest.approx(13 / 9 - 1)


def test_fewer_micro_batches_than_stages() -> None:
    """One micro-batch passes all stages alone."""
    assert bubble([3.0, 3.0, 3.0], 3, 1) == pytest.approx(2.0)
