"""State of the distributed optimizer, saved on three ranks and loaded on two, against sums over the ranks."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from safetensors.torch import load_file

from tests.launch import torchrun


def test_state_is_saved_whole_and_loads_on_other_ranks(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    torchrun(3, "-m", "tests.checkpoint.save_optimizer", "save", str(directory))

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        saved = dist_checkpointing.load_plain_tensors(str(directory))
    finally:
        dist.destroy_process_group()
    expected = load_file(tmp_path / "checkpoint.safetensors")
    assert len(expected) > 100
    for name, tensor in expected.items():
        assert torch.equal(saved[f"optimizer.state.{name}"], tensor), name

    files = [file.stat().st_size for file in directory.glob("*.distcp")]
    assert len(files) == 3 and max(files) < 1.5 * min(files)  # the ranks share the work
    output = torchrun(2, "-m", "tests.checkpoint.save_optimizer", "load", str(directory)).stdout
    assert output.count("loaded") == 4, output  # two ranks, without and with parallel reading
