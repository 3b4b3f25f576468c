"""Megatron's process groups for tests that need no second process."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from archscale_megatron import cpu


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    """Process groups of one rank and seeded generators, torn down after the module; and one thread, as models
    are so small that a second one only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    backend = "gloo" if cpu.ACTIVE else "nccl"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    yield
    torch.set_num_threads(threads)
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
