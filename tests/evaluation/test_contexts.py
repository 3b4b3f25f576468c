"""A context is filled to the last unit that fits, and depths are spread evenly."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from archscale_megatron.evaluation.contexts import fill, spread


def counting(text: str, verbose: bool) -> Any:
    """A tokenizer: as many ids as characters."""
    return SimpleNamespace(input_ids=list(range(len(text))))


@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=40),
    head=st.integers(0, 50),
    limit=st.integers(1, 3000),
    least=st.integers(1, 5),
)
def test_fill_is_the_largest_that_fits(sizes: list[int], head: int, limit: int, least: int) -> None:
    def text(units: int) -> str:
        return "x" * (head + sum(itertools.islice(itertools.cycle(sizes), units)))

    if len(text(least)) > limit:
        with pytest.raises(ValueError, match=f"its shortest prompt has {len(text(least))} tokens"):
            fill(text, counting, limit, least)
        return
    units, ids = fill(text, counting, limit, least)
    assert units >= least and len(ids) == len(text(units)) <= limit < len(text(units + 1))


def test_fill_takes_few_steps() -> None:
    """However long a text is: each step tokenizes the whole of it."""
    steps = []

    def text(units: int) -> str:
        steps.append(units)
        return "x" * (1000 + sum(10 + unit % 7 for unit in range(units)))

    assert len(fill(text, counting, 128_000, 1)[1]) > 127_980
    assert len(steps) < 10


@given(seed=st.integers(0, 1000), count=st.integers(1, 200))
def test_depths_are_spread_evenly(seed: int, count: int) -> None:
    depths = sorted(spread(seed, index) for index in range(count))
    assert depths[0] >= 0 and depths[-1] < 1
    gaps = [b - a for a, b in itertools.pairwise([*depths, depths[0] + 1])]
    assert max(gaps) <= 2.7 / count or count == 1
