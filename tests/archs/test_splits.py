"""Where patterns are cut, and what crosses the cuts."""

from itertools import combinations

import pytest

from archscale_megatron.archs.build import build_architecture
from archscale_megatron.archs.counts import layer_flops, output_flops
from archscale_megatron.archs.splits import boundary_bytes, imbalance, payloads, split_by_compute

ARCH = build_architecture("sambay", 8)


@pytest.mark.parametrize("segments", [1, 2, 3, 4, 7, 16])
def test_split_by_compute_is_the_best_there_is(segments: int) -> None:
    """Against all ways to cut, where there are few enough to try."""
    cost = [layer_flops(ARCH, symbol, 4096) for symbol in ARCH.pattern]
    cost[-1] += output_flops(ARCH)

    def largest(ends: tuple[int, ...]) -> float:
        return max(sum(cost[a:b]) for a, b in zip((0, *ends), (*ends, len(cost)), strict=True))

    split = split_by_compute(ARCH, segments, 4096).split("|")
    assert "".join(split) == ARCH.pattern and len(split) == segments and all(split)
    ends = tuple(sum(map(len, split[: i + 1])) for i in range(segments - 1))
    best = min(largest(ends) for ends in combinations(range(1, len(cost)), segments - 1))
    assert largest(ends) == pytest.approx(best)
    assert len(payloads(ARCH, "|".join(split))) == segments - 1


def test_more_stages_than_layers_is_an_error() -> None:
    with pytest.raises(ValueError, match="17 pipeline stages: .* has 16 hybrid layers"):
        split_by_compute(ARCH, 17, 64)


def test_imbalance_and_bytes_of_a_split() -> None:
    pattern = "m-W-m-|W-m-*|-U-X-"
    assert imbalance(ARCH, ARCH.pattern, 4096) == 1
    ends = (6, 11, 16)
    stages = []
    for first, end in zip((0, *ends), ends, strict=False):
        stages.append(sum(layer_flops(ARCH, symbol, 4096) for symbol in ARCH.pattern[first:end]))
    stages[-1] += output_flops(ARCH)
    assert imbalance(ARCH, pattern, 4096) == pytest.approx(3 * max(stages) / sum(stages))
    hidden = 4 * 992
    assert boundary_bytes(ARCH, pattern) == [hidden, hidden + 2 * (2 * 992 + 2 * 2 * 128)]
