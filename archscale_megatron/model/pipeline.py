"""Where a pattern is cut into pipeline stages, and the communicator that knows what crosses each cut."""

from __future__ import annotations

from typing import Any

from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

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
    cost = [layer_flops(arch, symbol, sequence_length) for symbol in arch.pattern]
    cost[-1] += output_flops(arch)
    before = [0.0]
    for c in cost:
        before.append(before[-1] + c)
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


class SharedStateCommunicator(P2PCommunicator):
    """Megatron's point-to-point communication, for tensors as wide as their boundary's payload.

    The schedules ask for `config.hidden_size` channels; `model.config` knows how many there are.
    """

    def _communicate(
        self, *, tensor_shape: Any, recv_prev: bool, recv_next: bool, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if tensor_shape is not None and (recv_prev or recv_next):
            # In the interleaved schedule this is one of many boundaries, and all have the same width.
            boundary = self.current_stage - 1 if recv_prev else self.current_stage
            payload = self.config.boundary_payloads[boundary]
            tensor_shape = (*tensor_shape[:2], self.config.boundary_width(payload))
        return super()._communicate(tensor_shape=tensor_shape, recv_prev=recv_prev, recv_next=recv_next, **kwargs)
