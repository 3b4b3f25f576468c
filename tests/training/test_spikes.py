"""Which values are noted as spikes. That a run notes one is in tests/faults/test_not_a_number.py."""

from __future__ import annotations

import math
import random
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from archscale_megatron.training.spikes import SMALLEST_WINDOW, THRESHOLD, WINDOW, Baseline, check_options


def spikes(values: list[float], window: int = WINDOW, threshold: float = THRESHOLD) -> list[int]:
    """Positions of the values that are noted."""
    baseline = Baseline(window, threshold)
    return [position for position, value in enumerate(values) if baseline.observe(value)]


def training(steps: int, seed: int) -> tuple[list[float], list[float]]:
    """Loss and gradient norm as they go: warm-up's steep fall from the loss of a uniform guess, a power law and noise;
    a norm that first rises, then falls, then has a log-normal's noise."""
    draw, losses, norms = random.Random(seed), [], []
    for step in range(1, steps + 1):
        losses.append(2.2 + 8.2 * math.exp(-step / 60) + 3 * step**-0.3 + draw.gauss(0, 0.03))
        norms.append(
            (0.3 + 1.5 * math.exp(-step / 80) + 3 * math.exp(-(((step - 25) / 15) ** 2))) * draw.lognormvariate(0, 0.08)
        )
    return losses, norms


@pytest.mark.parametrize("seed", range(5))
def test_silent_on_a_training_curve(seed: int) -> None:
    for values in training(3000, seed):
        assert spikes(values) == []


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("number, factor", [(0, 1.2), (1, 2.0)], ids=["loss", "gradient norm"])
def test_notes_planted_spikes(number: int, factor: float, seed: int) -> None:
    values = training(3000, seed)[number]
    planted = [700, 701, 1500, 2999]
    for position in planted:
        values[position] *= factor
    assert spikes(values) == planted


def test_example_of_the_line() -> None:
    """Median and deviation by numpy."""
    values = [4.0 + 0.01 * (7 * i % 11) for i in range(250)]
    baseline = Baseline(100, 6.0)
    assert not any(baseline.observe(value) for value in values)
    spike = baseline.observe(9.31)
    last = np.array(values[-100:])
    deviation = np.median(np.abs(last - np.median(last))) / 0.6744897501960817
    assert spike and spike.deviations == pytest.approx((9.31 - np.median(last)) / deviation, rel=1e-4)
    assert re.fullmatch(
        r"spike: lm loss 9\.31 at iteration 251, \d+\.\d deviations above the median 4\.05 of the last 100",
        spike.line("lm loss", 251),
    )


def test_window_must_be_half_full_and_forgets() -> None:
    level = [1.0 + 0.01 * (7 * i % 11) for i in range(400)]
    assert spikes([*level[:49], 50.0]) == []
    assert spikes([*level[:50], 50.0]) == [50]
    # Another level is noted until it is the median.
    assert spikes([*level, *(2 * v for v in level)]) == [*range(400, 450)]


def test_constant_values_have_no_spikes_of_rounding() -> None:
    assert spikes([2.0] * 100 + [2.0 + 1e-6]) == []
    assert spikes([2.0] * 100 + [2.02]) == [100]
    assert spikes([0.0] * 100 + [0.0, 1e-30]) == [101]


@given(st.lists(st.floats(0, 1e6), max_size=60), st.sampled_from([math.nan, math.inf, -math.inf]), st.integers(0, 60))
def test_what_is_not_finite_leaves_no_trace(values: list[float], strange: float, position: int) -> None:
    baseline, other = Baseline(20, 3.0), Baseline(20, 3.0)
    found = [baseline.observe(v) for v in [*values[:position], strange, *values[position:]]]
    assert found.pop(min(position, len(values))) is None
    assert found == [other.observe(v) for v in values]


@given(st.lists(st.floats(1e-3, 1e3), min_size=20, max_size=100), st.floats(1e-3, 1e3))
def test_scale_does_not_matter(values: list[float], scale: float) -> None:
    """A loss in other units has the same spikes, up to rounding."""
    baseline, scaled = Baseline(20, 3.0), Baseline(20, 3.0)
    for value in values:
        one, other = baseline.observe(value), scaled.observe(value * scale)
        if one and one.deviations > 3.01:
            assert other and other.deviations == pytest.approx(one.deviations, rel=1e-6)


@pytest.mark.parametrize(
    "window, threshold, error",
    [(SMALLEST_WINDOW - 1, 6.0, "--spike-window 9: use 10"), (-1, 6.0, "--spike-window -1"),
     (100, 0.0, "--spike-threshold 0"), (100, math.nan, "--spike-threshold nan")],
)  # fmt: skip
def test_options_that_cannot_be(window: int, threshold: float, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        check_options(window, threshold)
    check_options(0, 6.0)
    check_options(SMALLEST_WINDOW, 0.5)
