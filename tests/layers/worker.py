"""Runs the mixers of tests/layers/mixers.py on two ranks, and saves what came out as whole tensors.

torchrun --nproc-per-node 2 -m tests.layers.worker DIRECTORY

DIRECTORY/KIND.LAYOUT.safetensors has output, memory and all gradients, of layout "tp2", "stp2" (with sequence
parallelism) and "single". DIRECTORY/KIND.saved.safetensors has the parameters of "tp2", and KIND.loaded.safetensors
those of a single rank after they were saved in Megatron's format and loaded.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from archscale_megatron import cpu

cpu.install()

from archscale_megatron import megatron_patches  # noqa: E402

megatron_patches.apply()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import dist_checkpointing, mpu  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import Tensor  # noqa: E402

from archscale_megatron.mup.initialization import blocks_of  # noqa: E402
from tests.layers.mixers import SPECS, build_mixer, inputs, run  # noqa: E402
from tests.parallel.worker import join  # noqa: E402


def gathered(tensor: Tensor) -> dict[int, Tensor]:
    """The tensors of all tensor-parallel ranks."""
    parts = [torch.empty_like(tensor) for _ in range(mpu.get_tensor_model_parallel_world_size())]
    dist.all_gather(parts, tensor.contiguous(), group=mpu.get_tensor_model_parallel_group())
    return dict(enumerate(parts))


def whole(parameter: Any, tensor: Tensor) -> Tensor:
    parts = gathered(tensor.detach())
    return join((parameter.partition_dim, blocks_of(parameter, len(parts))), parts)


def train_once(mixer: Any, sequence_parallel: bool) -> dict[str, Tensor]:
    """Output, memory and gradients of one pass, put together from all ranks."""
    rank, size = mpu.get_tensor_model_parallel_rank(), mpu.get_tensor_model_parallel_world_size()

    def of_sequence(x: Tensor) -> Tensor:
        return x.chunk(size, 0)[rank] if sequence_parallel else x

    def whole_sequence(x: Tensor) -> Tensor:
        parts = gathered(x.detach())
        if sequence_parallel:
            return torch.cat(list(parts.values()))
        assert all(part.equal(parts[0]) for part in parts.values())
        return parts[0]

    def whole_channels(x: Tensor) -> Tensor:
        return torch.cat(list(gathered(x.detach()).values()), -1)

    data = inputs()
    hidden = of_sequence(data["hidden"]).clone().requires_grad_()
    memory, grad_memory = (data[name].chunk(size, -1)[rank] for name in ("memory", "grad_memory"))
    memory = memory.clone().requires_grad_()
    output, written = run(mixer, hidden, memory, data["starts"])
    ((output * of_sequence(data["grad_output"])).sum() + (written * grad_memory).sum()).backward()
    result = {"output": whole_sequence(output), "written": whole_channels(written)}
    result["grad.hidden"] = whole_sequence(hidden.grad)
    if memory.grad is not None:
        result["grad.memory"] = whole_channels(memory.grad)
    return result | {f"grad.{name}": whole(p, p.grad) for name, p in mixer.named_parameters()}


def main(directory: Path) -> None:
    dist.init_process_group("gloo")

    def save(name: str, tensors: dict[str, Tensor]) -> None:
        if dist.get_rank() == 0:
            save_file(tensors, directory / f"{name}.safetensors")

    mpu.initialize_model_parallel(2)
    for kind in SPECS:
        for layout, sequence_parallel in {"tp2": False, "stp2": True}.items():
            mixer = build_mixer(kind, 2, sequence_parallel=sequence_parallel)
            save(f"{kind}.{layout}", train_once(mixer, sequence_parallel))
        save(f"{kind}.saved", {name: whole(p, p) for name, p in mixer.named_parameters()})
        if dist.get_rank() == 0:
            (directory / kind).mkdir()
        dist.barrier()
        dist_checkpointing.save(mixer.sharded_state_dict("mixer."), directory / kind)
    mpu.destroy_model_parallel()

    mpu.initialize_model_parallel(1)
    for kind in SPECS:
        mixer = build_mixer(kind)
        save(f"{kind}.single", train_once(mixer, False))
        with torch.no_grad():
            for p in mixer.parameters():
                p.zero_()
        loaded = dist_checkpointing.load(mixer.sharded_state_dict("mixer."), directory / kind)
        mixer.load_state_dict({name.removeprefix("mixer."): value for name, value in loaded.items()})
        save(f"{kind}.loaded", {name: p.detach() for name, p in mixer.named_parameters()})
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
