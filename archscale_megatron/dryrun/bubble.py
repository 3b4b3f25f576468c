"""How long a pipeline idles: Megatron's schedule, played with the times that the stages take."""

from __future__ import annotations

from collections.abc import Sequence

Work = tuple[bool, int, int]
"""Forward?, segment, micro-batch."""


def bubble(segment_times: Sequence[float], stages: int, microbatches: int) -> float:
    """Idle time as a fraction of the ideal time of a step, in which every stage works all the time and equally.

    (p - 1) / (m v) for p equal stages of v segments each and m micro-batches (arXiv 2104.04473, section 2.2), more
    where stages differ. Communication takes no time.

    Args:
        segment_times: what each segment, in the order of the model, takes for a micro-batch, forward and backward,
            in any unit; a third of it is the forward pass.
        stages: segment i runs on stage i mod `stages`.
        microbatches: of a step; a multiple of the stages if they have several segments.
    """
    segments = len(segment_times)
    orders = [_order(stage, stages, segments // stages, microbatches) for stage in range(stages)]
    finished: dict[Work, float] = {}
    clocks, position = [0.0] * stages, [0] * stages
    while any(p < len(order) for p, order in zip(position, orders, strict=True)):
        for stage, order in enumerate(orders):
            while position[stage] < len(order):
                forward, segment, i = work = order[position[stage]]
                first = segment == 0 if forward else segment == segments - 1
                needed = (forward, segment - 1 if forward else segment + 1, i)
                if not first and needed not in finished:
                    break
                start = max(clocks[stage], 0.0 if first else finished[needed])
                clocks[stage] = finished[work] = start + segment_times[segment] * (1 if forward else 2) / 3
                position[stage] += 1
    return max(clocks) * stages / (microbatches * sum(segment_times)) - 1


def _order(stage: int, stages: int, virtual: int, microbatches: int) -> list[Work]:
    """What a stage does one after the other: 1F1B, interleaved if it has several segments, in groups of as many
    micro-batches as there are stages (megatron/core/pipeline_parallel/schedules.py)."""
    total = microbatches * virtual

    def nth(k: int, forward: bool) -> Work:
        if virtual == 1:
            return forward, stage, k
        group, within = divmod(k, stages * virtual)
        chunk = within // stages
        chunk = chunk if forward else virtual - 1 - chunk
        return forward, chunk * stages + stage, group * stages + within % stages

    warmup = stages - stage - 1 if virtual == 1 else (stages - stage - 1) * 2 + (virtual - 1) * stages
    warmup = min(warmup, total)
    order = [nth(k, True) for k in range(warmup)]
    for k in range(total - warmup):
        order += [nth(warmup + k, True), nth(k, False)]
    return order + [nth(k, False) for k in range(total - warmup, total)]
