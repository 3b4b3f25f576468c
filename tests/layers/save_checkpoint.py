"""Saves a tiny model of each family, all its parameters random, as a checkpoint of two tensor-parallel ranks.

torchrun --nproc-per-node 2 -m tests.layers.save_checkpoint DIRECTORY FAMILY ...
"""

from __future__ import annotations

import sys
from pathlib import Path

from archscale_megatron import cpu

cpu.install()

from archscale_megatron import megatron_patches  # noqa: E402

megatron_patches.apply()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import dist_checkpointing, mpu  # noqa: E402
from megatron.core.models.hybrid.hybrid_model import HybridModel  # noqa: E402
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed  # noqa: E402

from archscale_megatron.mup import initialization  # noqa: E402
from tests.model.building import build  # noqa: E402
from tests.parallel.layouts import tiny  # noqa: E402


def random_model(family: str, tp: int) -> HybridModel:
    """The same parameters at every layout."""
    usual = initialization.initial_values
    initialization.initial_values = lambda _, shape, arch, parametrization, generator: torch.randn(
        shape, generator=generator, device=generator.device
    )
    try:
        return build(tiny(family), tensor_model_parallel_size=tp)
    finally:
        initialization.initial_values = usual


if __name__ == "__main__":
    dist.init_process_group("gloo")
    mpu.initialize_model_parallel(2)
    model_parallel_cuda_manual_seed(1)
    for family in sys.argv[2:]:
        directory = Path(sys.argv[1]) / family
        directory.mkdir(exist_ok=True)
        dist.barrier()
        dist_checkpointing.save(random_model(family, tp=2).sharded_state_dict(), str(directory))
    dist.barrier()
    dist.destroy_process_group()
