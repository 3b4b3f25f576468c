"""How tokens go to experts in a dry run."""

import pytest

from archscale_megatron.dryrun.values import balanced_choices


@pytest.mark.parametrize("tokens, experts, top_k", [(64, 8, 2), (64, 63, 7), (5, 4, 4)])
def test_balanced_choices(tokens: int, experts: int, top_k: int) -> None:
    choices = balanced_choices(tokens, experts, top_k)
    assert (choices.sum(1) == top_k).all()
    share = tokens * top_k / experts
    assert (abs(choices.sum(0) - share) < 1).all()
