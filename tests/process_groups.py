"""Process groups of workers that go through several layouts."""

from __future__ import annotations

import torch.distributed as dist
from megatron.core import mpu


def end_layout() -> None:
    """End Megatron's process groups, on all ranks; the default group stays.

    Megatron only forgets them. Each would keep its open files, and three threads of gloo's.
    """
    mpu.destroy_model_parallel()
    dist.barrier()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
