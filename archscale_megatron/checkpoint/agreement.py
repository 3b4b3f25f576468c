"""What one rank finds, all ranks know: nobody waits for a rank that has failed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any


def rank_and_size() -> tuple[int, int]:
    """0 of 1 without torch.distributed, which is not imported for this."""
    dist = sys.modules.get("torch.distributed")
    return (dist.get_rank(), dist.get_world_size()) if dist and dist.is_initialized() else (0, 1)


def of_first_rank(value: Any) -> Any:
    """Rank 0's `value`, on all ranks."""
    values = [value]
    if rank_and_size()[1] > 1:
        import torch.distributed as dist

        dist.broadcast_object_list(values, src=0)
    return values[0]


def of_all_ranks(value: Any) -> list[Any]:
    """Every rank's `value`, in order, on all ranks."""
    values = [value] * rank_and_size()[1]
    if len(values) > 1:
        import torch.distributed as dist

        dist.all_gather_object(values, value)
    return values


def first_problem(function: Callable[[], object]) -> str | None:
    """Call it on all ranks; the message of the first OSError or ValueError in the order of ranks, on all ranks."""
    try:
        function()
        problem = None
    except (OSError, ValueError) as error:
        problem = str(error)
    return next((p for p in of_all_ranks(problem) if p is not None), None)


def say(line: str) -> None:
    """Print it on rank 0."""
    if rank_and_size()[0] == 0:
        print(line, flush=True)


def is_first_to_fail() -> bool:
    """True on the first rank that asks: of one failure, which may concern all ranks or one, one rank tells."""
    if rank_and_size()[1] == 1:
        return True
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store().add("checkpoint failure", 1) == 1
