"""Initial values of parameters: one global draw each, the same at every parallel layout (`mup.rules` says which)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Generator, Tensor, nn

from archscale_megatron.archs.architecture import Architecture
from archscale_megatron.mup.classes import ParameterClass, parameter_class
from archscale_megatron.mup.rules import Parametrization

# Rows of vocabulary-sized parameters are drawn in blocks, so that padding does not change the others.
VOCABULARY_BLOCK = 64
EXPERT = re.compile(
    r"(?P<experts>.*\.experts\.)(?:local_experts\.(?P<sequential>\d+)\.)?(?P<weight>linear_fc[12]\.weight)(?P<grouped>\d*)"
)
"""What Megatron names an expert's weight on one rank: `experts.local_experts.3.linear_fc1.weight`, or
`experts.linear_fc1.weight3` of a grouped product."""


def named_global_parameters(model: Any) -> Iterator[tuple[str, Any]]:
    """Parameters with layers and experts numbered as in the whole model; tied output weights are the embedding.

    The experts of a grouped matrix product are named as those of a sequence of MLPs.
    """
    layers = {f"decoder.layers.{i}.": layer.layer_number - 1 for i, layer in enumerate(model.decoder.layers)}
    for name, parameter in model.named_parameters():
        for prefix, number in layers.items():
            if name.startswith(prefix):
                name = f"decoder.layers.{number}.{name.removeprefix(prefix)}"
                break
        if match := EXPERT.fullmatch(name):
            experts = model.config.num_moe_experts // parallel_state.get_expert_model_parallel_world_size()
            first = experts * parallel_state.get_expert_model_parallel_rank()
            number = first + int(match["sequential"] or match["grouped"])
            name = f"{match['experts']}local_experts.{number}.{match['weight']}"
        if name == "output_layer.weight" and model.share_embeddings_and_output_weights:
            name = "embedding.word_embeddings.weight"
        yield name, parameter


@torch.no_grad()
def initialize_parameters(model: nn.Module, arch: Architecture, parametrization: Parametrization, seed: int) -> None:
    """Give every parameter of this rank its part of the global draw that `seed` and its name decide."""
    for name, parameter in named_global_parameters(model):
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator(device=parameter.device).manual_seed(int.from_bytes(digest[:7]))
        split = partition_of(name, parameter)
        values = initial_values(name, whole_shape(parameter, split), arch, parametrization, generator)
        if split:
            values = partition(values, split.dim, split.blocks, split.size, split.rank)
        parameter.copy_(values)


def initial_values(
    name: str, shape: tuple[int, ...], arch: Architecture, parametrization: Parametrization, generator: Generator
) -> Tensor:
    """The whole parameter `name`, fp32, on the generator's device."""
    values = torch.empty(shape, device=generator.device)
    distribution = parametrization.initial(name, shape, arch)
    of_vocabulary = parameter_class(name) in (ParameterClass.EMBEDDING, ParameterClass.OUTPUT)
    for block in values.split(VOCABULARY_BLOCK) if of_vocabulary else [values]:
        distribution.draw(block, generator)
    return values


def blocks_of(parameter: Any, size: int) -> tuple[int, ...]:
    """Sizes, over all `size` ranks, of what lies behind each other along a parameter's `partition_dim`.

    They are its `partition_blocks` (z, x, B, C and dt of Mamba-2, say) or else, as in Megatron, `partition_stride`
    equal ones (SwiGLU's gate and up).
    """
    stride = parameter.partition_stride
    equal = (parameter.shape[parameter.partition_dim] * size // stride,) * stride
    return getattr(parameter, "partition_blocks", equal)


def partition(values: Tensor, dim: int, blocks: tuple[int, ...], size: int, rank: int) -> Tensor:
    """What rank `rank` of `size` holds of a whole parameter: its slice of each of the `blocks` along `dim`."""
    return torch.cat([block.chunk(size, dim)[rank] for block in values.split(blocks, dim)], dim)


@dataclass(frozen=True)
class Partition:
    """Which part of a whole parameter this rank holds: that of `rank` of `size`, of the `blocks` along `dim`."""

    dim: int
    blocks: tuple[int, ...]
    size: int
    rank: int


def partition_of(name: str, parameter: Any) -> Partition | None:
    """This rank's part of the parameter `name` (as `named_global_parameters` names it); None is all of it."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return None
    if ".experts." in name:
        size = parallel_state.get_expert_tensor_parallel_world_size()
        rank = parallel_state.get_expert_tensor_parallel_rank()
    else:
        size = parallel_state.get_tensor_model_parallel_world_size()
        rank = parallel_state.get_tensor_model_parallel_rank()
    return Partition(parameter.partition_dim, blocks_of(parameter, size), size, rank)


def whole_shape(parameter: Tensor, split: Partition | None) -> tuple[int, ...]:
    """Of the parameter over all ranks; `split` is what `partition_of` says of it."""
    shape = list(parameter.shape)
    if split:
        shape[split.dim] *= split.size
    return tuple(shape)
