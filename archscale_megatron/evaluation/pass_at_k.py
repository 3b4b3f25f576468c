"""How good a model is by several answers to each question: pass@k, the majority's answer, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Z = 1.959963984540054  # the normal distribution's 97.5 % quantile


@dataclass(frozen=True)
class Mean:
    """A mean over questions.

    Attributes:
        stderr: Standard error, clustered by question: what another draw of questions would change, their samples with
            them (arXiv 2411.00640, section 2.2); None for a single question.
        low, high: A 95 % interval; see `mean`.
    """

    value: float
    stderr: float | None
    low: float
    high: float


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The chance that one of k samples or more is right, estimated without bias where `correct` of `samples` are.

    1 - C(n - c, k) / C(n, k): arXiv 2107.03374, equation 1. Raises ValueError unless 1 <= k <= n and 0 <= c <= n.
    """
    if not 1 <= k <= samples or not 0 <= correct <= samples:
        raise ValueError(f"pass@{k} of {correct} right among {samples}: k and the right ones must fit in the samples")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def majority[Answer](answers: Sequence[Answer], equal: Callable[[Answer, Answer], bool]) -> list[list[int]]:
    """The largest groups of equal answers, several if they tie, as positions; none of no answers.

    An answer joins the first group whose first member equals it.
    """
    groups: list[list[int]] = []
    for i, answer in enumerate(answers):
        for group in groups:
            if equal(answers[group[0]], answer):
                group.append(i)
                break
        else:
            groups.append([i])
    most = max(map(len, groups), default=0)
    return [group for group in groups if len(group) == most]


def mean(values: Sequence[float], samples: int = 1) -> Mean:
    """Mean of what each question gave, from 0 to 1, by that many samples of it.

    The interval is Wilson's score interval for as many independent trials as would have this standard error, p (1 - p)
    / stderr^2 (Kish's effective sample size): unlike a bootstrap over questions it is not a point where all are right
    or all wrong, it stays within 0 and 1, and it needs no random numbers. There are never more such trials than
    samples; where all questions are right, or all wrong, there are as many as questions.
    """
    count = len(values)
    p = math.fsum(values) / count
    variance = math.fsum((value - p) ** 2 for value in values) / (count - 1) / count if count > 1 else None
    inside = p * (1 - p)
    if variance is None or inside <= 0:
        trials = float(count)
    else:
        trials = min(inside / variance if variance else math.inf, count * samples)
    center = (p + Z**2 / (2 * trials)) / (1 + Z**2 / trials)
    half = Z / (1 + Z**2 / trials) * math.sqrt(max(inside, 0.0) / trials + Z**2 / (4 * trials**2))
    stderr = None if variance is None else math.sqrt(variance)
    return Mean(p, stderr, max(0.0, center - half), min(1.0, center + half))
