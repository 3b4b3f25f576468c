"""Distributions of initial values: what to print, their standard deviation, and the draw."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Generator, Tensor

# Step sizes of a scan at the start, log-uniform (arXiv 2312.00752, section 3.6).
SMALLEST_STEP, LARGEST_STEP = 1e-3, 0.1


@dataclass(frozen=True)
class Distribution:
    """
    Attributes:
        text: as people write it: `N(0, 0.02^2)`.
        std: standard deviation of one value.
        draw: fills an fp32 tensor in place with independent draws, and returns it.
    """

    text: str
    std: float
    draw: Callable[[Tensor, Generator], Tensor]

    def __str__(self) -> str:
        return self.text


def normal(std: float) -> Distribution:
    return Distribution(f"N(0, {std:.4g}^2)", std, lambda x, generator: x.normal_(0.0, std, generator=generator))


def uniform(bound: float) -> Distribution:
    """U(-bound, bound)."""
    return Distribution(
        f"U(±{bound:.4g})", bound / math.sqrt(3), lambda x, generator: x.uniform_(-bound, bound, generator=generator)
    )


def constant(value: float) -> Distribution:
    return Distribution(f"{value:g}", 0.0, lambda x, _: x.fill_(value))


def log_range(size: int) -> Distribution:
    """log(1), ..., log(size) along the last dimension."""
    logs = [math.log(i + 1) for i in range(size)]
    return Distribution(f"log(1..{size})", statistics.pstdev(logs), lambda x, _: x.copy_(x.new_tensor(logs)))


def log_uniform(low: float, high: float) -> Distribution:
    """The logarithm of U(low, high), 0 <= low."""

    def moments(x: float) -> tuple[float, float]:
        """Integrals from 0 to x of log and of its square."""
        log = math.log(x) if x else 0.0
        return x * (log - 1), x * (log * log - 2 * log + 2)

    (a1, a2), (b1, b2) = moments(low), moments(high)
    mean, square = (b1 - a1) / (high - low), (b2 - a2) / (high - low)
    return Distribution(
        f"log U({low:g}, {high:g})",
        math.sqrt(square - mean * mean),
        lambda x, generator: x.uniform_(low, high, generator=generator).log_(),
    )


def inverse_softplus_of_step() -> Distribution:
    """What softplus makes a step size of, drawn log-uniformly from [1e-3, 0.1], at least 1e-4 (Mamba's code)."""
    low, high = math.log(SMALLEST_STEP), math.log(LARGEST_STEP)

    def draw(x: Tensor, generator: Generator) -> Tensor:
        step = x.uniform_(low, high, generator=generator).exp_().clamp_(min=1e-4)
        return x.copy_(step + (-(-step).expm1()).log())

    points = 1000  # no closed form: the midpoint rule
    steps = [math.exp(low + (i + 0.5) / points * (high - low)) for i in range(points)]
    std = statistics.pstdev(step + math.log(-math.expm1(-step)) for step in steps)
    return Distribution(f"softplus^-1(exp U(log {SMALLEST_STEP:g}, log {LARGEST_STEP:g}))", std, draw)
