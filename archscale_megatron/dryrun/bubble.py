"""How long a pipeline idles: Megatron's schedule, played with the times that the stages take."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table

Work = tuple[bool, int, int]
"""Forward?, segment, micro-batch."""


def bubble(segment_times: Sequence[float], stages: int, microbatches: int, group: int | None = None) -> float:
    """Idle time as a fraction of the ideal time of a step, in which every stage works all the time and equally.

    (p - 1) / (m v) for p equal stages of v segments each and m micro-batches (arXiv 2104.04473, section 2.2), more
    where stages differ. Communication takes no time.

    Args:
        segment_times: what each segment, in the order of the model, takes for a micro-batch, forward and backward,
            in any unit; a third of it is the forward pass.
        stages: segment i runs on stage i mod `stages`.
        microbatches: of a step.
        group: micro-batches that a stage takes through one of its segments before the next; as many as stages if None.
    """
    segments = len(segment_times)
    orders = [_order(stage, stages, segments // stages, microbatches, group or stages) for stage in range(stages)]
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


def _order(stage: int, stages: int, virtual: int, microbatches: int, group: int) -> list[Work]:
    """What a stage does one after the other: Megatron's 1F1B, interleaved if it has several segments."""
    table = get_schedule_table(microbatches, virtual, group)  # (micro-batch, the stage's how-many-eth segment)
    communicator: Any = SimpleNamespace(
        pp_group=SimpleNamespace(size=lambda: stages, rank=lambda: stage),
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
    )
    _, _, warmup, remaining = get_pp_rank_microbatches(microbatches, virtual, group, p2p_communicator=communicator)
    forward: list[Work] = [(True, chunk * stages + stage, i) for i, chunk in table]
    backward: list[Work] = [(False, (virtual - 1 - chunk) * stages + stage, i) for i, chunk in table]
    pairs = zip(forward[warmup:], backward, strict=False)
    return [*forward[:warmup], *(work for pair in pairs for work in pair), *backward[remaining:]]
