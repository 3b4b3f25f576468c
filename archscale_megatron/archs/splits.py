"""Where a pattern is cut into pipeline stages, and what crosses each cut."""

from __future__ import annotations

from itertools import accumulate

from archscale_megatron.archs.architecture import PIPE, Architecture, Payload
from archscale_megatron.archs.counts import layer_flops, output_flops


def split_by_compute(arch: Architecture, segments: int, sequence_length: int) -> str:
    """`arch.pattern` with `segments - 1` pipes, so that the most expensive segment costs the least.

    The costs are forward FLOPs; the last segment also has the output layer. Among equals, the earliest cut.

    Raises:
        ValueError: fewer layers than segments.
    """
    layers = len(arch.pattern)
    if segments > layers:
        raise ValueError(
            f"{segments} pipeline stages: {arch.family} at depth {arch.depth} has {layers} hybrid layers "
            f"(a mixer or an MLP each); use 1 to {layers} stages"
        )
    before = [0.0, *accumulate(_costs(arch, sequence_length))]
    # best[n] is the smallest possible maximum over the segments of the first n layers, and where they end.
    best: list[tuple[float, list[int]]] = [(before[n], [n]) for n in range(layers + 1)]
    for k in range(2, segments + 1):
        best = [(float("inf"), [])] * k + [
            min((max(best[cut][0], before[n] - before[cut]), [*best[cut][1], n]) for cut in range(k - 1, n))
            for n in range(k, layers + 1)
        ]
    ends = best[layers][1]
    return PIPE.join(arch.pattern[a:b] for a, b in zip([0, *ends], ends, strict=False))


def payloads(arch: Architecture, pattern: str) -> list[Payload]:
    """What crosses each cut of `pattern` (`arch.pattern` with pipes), in order."""
    result, layer = [], -1
    for symbol in pattern:
        if symbol == PIPE:
            result.append(arch.payload_after(layer))
        else:
            layer += 1
    return result


def imbalance(arch: Architecture, pattern: str, sequence_length: int) -> float:
    """Cost of the most expensive segment of `pattern` (`arch.pattern` with pipes) over that of the mean segment."""
    segments = segment_flops(arch, pattern, sequence_length)
    return max(segments) / sum(segments) * len(segments)


def segment_flops(arch: Architecture, pattern: str, sequence_length: int) -> list[float]:
    """Forward FLOPs per token of each segment of `pattern`; the last one's with the output layer's."""
    costs = iter(_costs(arch, sequence_length))
    return [sum(next(costs) for _ in segment) for segment in pattern.split(PIPE)]


def boundary_bytes(arch: Architecture, pattern: str) -> list[int]:
    """Bytes a token that cross each cut: hidden states in fp32, shared state in bf16."""
    return [4 * arch.hidden_size + 2 * arch.payload_size(payload) for payload in payloads(arch, pattern)]


def _costs(arch: Architecture, sequence_length: int) -> list[float]:
    """Forward FLOPs per token of each hybrid layer; the last one's with the output layer's."""
    costs = [layer_flops(arch, symbol, sequence_length) for symbol in arch.pattern]
    costs[-1] += output_flops(arch)
    return costs
