"""What a run left behind."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def scalars(run: Path, tag: str) -> dict[int, float]:
    """Iteration -> value; of iterations that ran twice, the later one."""
    values = {}
    for file in sorted((run / "tensorboard").glob("events*"), key=lambda f: f.stat().st_mtime):
        events = EventAccumulator(str(file)).Reload()
        if tag in events.Tags()["scalars"]:
            values |= {event.step: event.value for event in events.Scalars(tag)}
    return values


def tensors(run: Path, iteration: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, weights and optimizer state."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        state = dist_checkpointing.load_plain_tensors(str(run / f"iter_{iteration:07d}"))
    finally:
        dist.destroy_process_group()
    return {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
