"""Planted parameters come back, and R^2, predictions and intervals are what plain numpy and coverage say."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from archscale_megatron.scaling import laws
from archscale_megatron.scaling.laws import CHINCHILLA, DATA, FLOPS, Law, fit, predict_largest

DEPTHS = np.array([8.0, 12, 16, 20, 24])
F = 6 * (237568 * DEPTHS**3) ** 2 * 1e11 / 973078528
GRID = np.array([(n, d) for n in (1e8, 3e8, 1e9, 3e9, 1e10) for d in (2e9, 6e9, 2e10, 6e10)])
HOFFMANN = np.array([406.4, 0.34, 410.7, 0.28, 1.69])  # arXiv 2203.15556, equation 10


def reference(x: np.ndarray, loss: np.ndarray) -> tuple[float, float, float, float]:
    """A, b, C and R^2 of one term: for each b of a grid that is refined, A and C are linear least squares."""
    low, high = 1e-3, 4.0
    for _ in range(12):
        grid = np.linspace(low, high, 400)
        found = [_linear(x, loss, b) for b in grid]
        best = int(np.argmin([squares for _, _, squares in found]))
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, 399)]
    a, c, squares = found[best]
    return a, grid[best], c, 1 - squares / ((loss - loss.mean()) ** 2).sum()


def _linear(x: np.ndarray, loss: np.ndarray, b: float) -> tuple[float, float, float]:
    matrix = np.stack([(x / 1e15) ** -b, np.ones_like(x)], axis=1)
    (a, c), *_ = np.linalg.lstsq(matrix, loss, rcond=None)
    return a * 1e15**b, c, float(((matrix @ [a, c] - loss) ** 2).sum())


@settings(max_examples=30, deadline=None)
@given(b=st.floats(0.03, 0.6), c=st.floats(0.3, 3.0), span=st.floats(0.2, 2.0), scale=st.sampled_from([1.0, 1e9, 1e20]))
def test_planted_term_is_found(b: float, c: float, span: float, scale: float) -> None:
    x = np.array([1.0, 2, 4, 10, 30, 70]) * scale
    a = span * scale**b
    found = fit(DATA, x[:, None], a * x**-b + c).values
    assert found == pytest.approx([a, b, c], rel=1e-4)


@settings(max_examples=10, deadline=None)
@given(alpha=st.floats(0.2, 0.6), beta=st.floats(0.2, 0.6), limit=st.floats(0.8, 2.5))
def test_planted_terms_of_chinchilla_are_found(alpha: float, beta: float, limit: float) -> None:
    planted = np.array([0.5 * 1e9**alpha, alpha, 0.6 * 1e10**beta, beta, limit])
    assert fit(CHINCHILLA, GRID, CHINCHILLA(planted, GRID)).values == pytest.approx(planted, rel=1e-3)


def test_hoffmanns_law_from_noise_and_an_outlier() -> None:
    """What Huber's loss is for: one run that went wrong, among points with noise of 0.05%."""
    loss = CHINCHILLA(HOFFMANN, GRID) * np.exp(5e-4 * np.random.default_rng(0).standard_normal(len(GRID)))
    loss[7] *= 1.1
    robust, plain = fit(CHINCHILLA, GRID, loss), fit(Law("", "", CHINCHILLA.variables, CHINCHILLA.names), GRID, loss)
    assert robust.values[[1, 3, 4]] == pytest.approx(HOFFMANN[[1, 3, 4]], rel=0.05)
    assert plain.values[[1, 3, 4]] != pytest.approx(HOFFMANN[[1, 3, 4]], rel=0.05)


@pytest.mark.parametrize("seed", range(4))
def test_noisy_term_is_the_reference(seed: int) -> None:
    loss = 49.6 * F**-0.0745 + 0.64 + 1e-3 * np.random.default_rng(seed).standard_normal(5)
    found = fit(FLOPS, F[:, None], loss)
    assert [*found.values, found.r_squared] == pytest.approx(reference(F, loss), rel=1e-4)
    held = predict_largest(FLOPS, F[:, None], loss)
    a, b, c, _ = reference(F[:-1], loss[:-1])
    assert held is not None and held.loss == loss[-1]
    assert held.predicted == pytest.approx(a * F[-1] ** -b + c, rel=1e-6)
    assert held.relative_error == pytest.approx((a * F[-1] ** -b + c - loss[-1]) / loss[-1], rel=1e-3)


def test_order_of_points_does_not_matter() -> None:
    loss = 49.6 * F**-0.0745 + 0.64 + 1e-3 * np.random.default_rng(5).standard_normal(5)
    turned = predict_largest(FLOPS, F[::-1, None], loss[::-1])
    held = predict_largest(FLOPS, F[:, None], loss)
    assert turned is not None and held is not None
    assert turned.predicted == pytest.approx(held.predicted, rel=1e-9)
    assert turned.loss == held.loss


def test_points_at_the_largest_are_held_out_together() -> None:
    x = np.append(F, F[-1])
    loss = 49.6 * x**-0.0745 + 0.64
    loss[-1] += 0.1
    held = predict_largest(FLOPS, x[:, None], loss)
    assert held is not None and held.loss == pytest.approx(loss[-2:].mean())
    assert held.predicted == pytest.approx(loss[-2], abs=1e-6)


def test_intervals_hold_the_planted_limit_about_as_often_as_they_say() -> None:
    """100 series of 5 points; of intervals of 95%, 3 standard deviations are 6.5."""
    hits = 0
    for seed in range(100):
        loss = 49.6 * F**-0.0745 + 0.64 + 1e-3 * np.random.default_rng(seed).standard_normal(5)
        found = fit(FLOPS, F[:, None], loss, draws=100, level=0.95, seed=seed)
        assert found.intervals is not None
        low, high = found.intervals[2]
        hits += low <= 0.64 <= high
    assert hits >= 89


def test_intervals_follow_the_seed_and_the_level() -> None:
    loss = 49.6 * F**-0.0745 + 0.64 + 1e-3 * np.random.default_rng(1).standard_normal(5)
    wide, again, other, narrow = (
        fit(FLOPS, F[:, None], loss, draws=100, level=level, seed=seed).intervals
        for level, seed in ((0.95, 0), (0.95, 0), (0.95, 1), (0.5, 0))
    )
    assert wide is not None and again is not None and other is not None and narrow is not None
    assert (wide == again).all() and (wide != other).any()
    assert (wide[:, 0] < narrow[:, 0]).all() and (narrow[:, 1] < wide[:, 1]).all()


@pytest.mark.parametrize(
    "law, x, loss, message",
    [
        (FLOPS, F[:3, None], [3, 2.5, 2.2], "3 points for 3 free parameters; needs 4 or more"),
        (FLOPS, F[[0, 0, 1, 1], None], [3, 3, 2.5, 2.5], "2 different flops; needs 3"),
        (FLOPS, F[:, None], [2.0, 2.1, 2.2, 2.3, 2.4], "does not fall with flops"),
        (FLOPS, F[:, None], [2.0] * 5, "does not fall with flops"),
        (CHINCHILLA, GRID[:5], [3.0, 2.9, 2.8, 2.7, 2.6], "5 points for 5 free parameters; needs 6"),
        (CHINCHILLA, np.array([(1e9, d) for d in range(1, 7)]), [3.0] * 6, "1 different parameters; needs 2"),
        (CHINCHILLA, np.array([(n, 20 * n) for n in (1e8, 2e8, 4e8, 1e9, 2e9, 4e9)]), [3.0] * 6, "grow together"),
    ],
)
def test_what_cannot_be_fitted(law: Law, x: np.ndarray, loss: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(law, x, np.array(loss))
    assert predict_largest(law, x, np.array(loss)) is None


def test_limit_at_its_bound_is_zero() -> None:
    found = fit(FLOPS, F[:, None], 30 * F**-0.06)
    assert found.values == pytest.approx([30, 0.06, 0], rel=1e-4, abs=1e-4)
    convex = fit(FLOPS, F[:, None], np.array([2.6, 2.4, 2.2, 2.0, 1.7]))
    assert convex.values[2] == 0


def test_jacobian_is_that_of_the_residuals() -> None:
    """A wrong one would still find the minimum, only later."""
    from scipy.optimize import least_squares

    x, loss = GRID / 1e9, CHINCHILLA(HOFFMANN, GRID)
    seen = []

    def spy(residuals, start, *, jac, **options):
        numeric = [(residuals(start + step) - residuals(start - step)) / 2e-6 for step in 1e-6 * np.eye(len(start))]
        assert jac(start) == pytest.approx(np.array(numeric).T, rel=1e-5, abs=1e-8)
        seen.append(len(start))
        return least_squares(residuals, start, jac=jac, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scipy.optimize.least_squares", spy)
        for law, columns in ((CHINCHILLA, x), (FLOPS, x[:, :1])):
            laws._minimise(law, columns, loss, np.log([0.5, 0.3, 0.6, 0.4, 1.1][-len(law.names) :]))
    assert seen == [5, 3]
