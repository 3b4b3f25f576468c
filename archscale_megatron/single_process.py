"""Megatron in a program of one process, which a user starts without torchrun."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator

from archscale_megatron import cpu


def prepare() -> None:
    """Make this process ready for Megatron: the only rank, whether torchrun started it or the user did, and quiet.

    Call it before the first import of Megatron.

    Raises:
        ValueError: it is one of several.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) != 1:
        raise ValueError(f"started on {os.environ['WORLD_SIZE']} processes; it runs on 1 (--nproc-per-node 1)")
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        os.environ.setdefault(name, value)
    quietly_install()


def stand_for(nodes: int, gpus_per_node: int, command_line: list[str]) -> None:
    """Make this process ready for Megatron as rank 0 of a job that is not there, started with `command_line`.

    Raises:
        ValueError: one of the numbers is less than 1.
    """
    for name, number in {"nodes": nodes, "gpus-per-node": gpus_per_node}.items():
        if number < 1:
            raise ValueError(f"--{name} {number}: must be 1 or more")
    sys.argv[1:] = command_line
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(nodes * gpus_per_node)}
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a GPU has nothing to do here
    quietly_install()


def quietly_install() -> None:
    """Make this process ready for Megatron, alone or as one of several, and quiet; before the first import of it."""
    warnings.simplefilter("ignore")  # Megatron tells of each library that it does not find
    logging.disable(logging.WARNING)
    cpu.install()
    from archscale_megatron import megatron_patches

    megatron_patches.apply()


@contextlib.contextmanager
def process_groups() -> Iterator[None]:
    """Megatron's process groups, without opening a port, and its seeded generators."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    dist.init_process_group("gloo" if cpu.ACTIVE else "nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
