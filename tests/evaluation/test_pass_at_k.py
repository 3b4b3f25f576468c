"""pass@k and the majority against enumeration, the interval against scipy and against how often it holds."""

import itertools
import math
import random
import statistics

import pytest
from scipy.stats import binomtest

from archscale_megatron.evaluation.pass_at_k import Z, majority, mean, pass_at_k


def test_pass_at_k_is_the_share_of_subsets_with_a_right_one() -> None:
    for n in range(1, 8):
        for correct, k in itertools.product(range(n + 1), range(1, n + 1)):
            right = [i < correct for i in range(n)]
            subsets = [any(one) for one in itertools.combinations(right, k)]
            assert pass_at_k(n, correct, k) == pytest.approx(sum(subsets) / len(subsets), abs=1e-12)
    assert pass_at_k(64, 3, 1) == pytest.approx(3 / 64)
    assert pass_at_k(1000, 1, 999) == pytest.approx(0.999)
    for n, correct, k in ((4, 1, 0), (4, 1, 5), (4, 5, 1), (4, -1, 1)):
        with pytest.raises(ValueError, match=f"pass@{k} of {correct} right among {n}"):
            pass_at_k(n, correct, k)


def test_majority_by_counting() -> None:
    for length in range(7):
        for answers in itertools.product("abc", repeat=length):
            most = max((answers.count(one) for one in "abc"), default=0)
            expected = {one for one in answers if answers.count(one) == most}
            groups = majority(answers, str.__eq__)
            assert {answers[group[0]] for group in groups} == expected and len(groups) == len(expected)
            assert all({answers[i] for i in group} == {answers[group[0]]} and len(group) == most for group in groups)


def test_majority_compares_with_the_first_of_a_group() -> None:
    asked: list[tuple[float, float]] = []

    def close(a: float, b: float) -> bool:
        asked.append((a, b))
        return abs(a - b) < 1.5

    assert majority([1.0, 2.0, 3.0], close) == [[0, 1]]
    assert asked == [(1.0, 2.0), (1.0, 3.0)]


def test_mean_and_its_error_are_clustered() -> None:
    values = [0.25, 0.5, 1.0, 0.0, 0.75]
    found = mean(values, samples=4)
    assert found.value == pytest.approx(0.5)
    assert found.stderr == pytest.approx(statistics.stdev(values) / math.sqrt(5))
    # Repeating every sample says nothing new of the questions.
    assert mean(values, samples=400) == found
    assert mean([0.5]).stderr is None


@pytest.mark.parametrize("right", [0, 30])
@pytest.mark.parametrize("samples", [1, 64])
def test_all_right_or_all_wrong_is_wilson_over_questions(right: int, samples: int) -> None:
    found = mean([float(right > 0)] * 30, samples)
    expected = binomtest(right, 30).proportion_ci(0.95, "wilson")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert found.stderr == 0


def test_interval_is_wilson_for_the_effective_trials() -> None:
    # One sample of 101 questions: p (1 - p) / stderr^2 is 100, of which 25.74 are right; between scipy's 25 and 26.
    found = mean([1.0] * 26 + [0.0] * 75)
    low, high = (binomtest(k, 100).proportion_ci(0.95, "wilson") for k in (25, 26))
    assert low.low < found.low < high.low and low.high < found.high < high.high
    # Samples that agree no more than chance has them: as many trials as samples, and no more.
    found = mean([0.5] * 25, samples=4)
    expected = binomtest(50, 100).proportion_ci(0.95, "wilson")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    # Far from the edges it is the usual one.
    values = [i / 10 % 1 for i in range(1000)]
    found = mean(values, samples=10)
    assert found.stderr is not None
    assert found.high - found.value == pytest.approx(Z * found.stderr, rel=0.02)


def test_the_interval_holds_19_times_in_20() -> None:
    """Questions of chances between 0 and 1, most near the ends, as benchmarks have them; 4 samples each."""
    draw = random.Random(1)
    held, tries = 0, 4000
    for _ in range(tries):
        chances = [draw.betavariate(0.3, 0.7) for _ in range(30)]
        found = mean([sum(draw.random() < p for _ in range(4)) / 4 for p in chances], samples=4)
        held += found.low <= 0.3 <= found.high
    assert 0.93 < held / tries < 0.97
