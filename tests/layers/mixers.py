"""Small mixers with a scan, and GMUs with a norm: how tests build and run them."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from archscale_megatron.layers.gated_delta_net import gated_delta_net_spec
from archscale_megatron.layers.gmu import gmu_spec
from archscale_megatron.layers.mamba2 import mamba2_spec
from archscale_megatron.layers.shared_state import SequenceContext, SharedState
from archscale_megatron.mup.initialization import blocks_of, partition

HIDDEN, LENGTH, BATCH = 16, 40, 2
# Sizes of blocks are all different, so that a block in the place of another is noticed.
SPECS = {
    "mamba2": mamba2_spec(LocalSpecProvider(), heads=4, head_dim=6, state_size=10, conv_kernel=4),
    "gated_delta_net": gated_delta_net_spec(LocalSpecProvider(), heads=2, head_dim=6, conv_kernel=4),
    "gmu": gmu_spec(LocalSpecProvider(), memory_size=24, normalize=True, bias=False),
}
MEMORY_SIZE = 24  # of all three


def build_mixer(kind: str | ModuleSpec, tp_size: int = 1, **options: Any) -> Any:
    """The mixer in fp32, its parameters filled with this rank's part of draws that are the same at every layout."""
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=2,
        tensor_model_parallel_size=tp_size,
        layernorm_epsilon=1e-5,
        perform_initialization=False,
        **options,
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    spec = SPECS[kind] if isinstance(kind, str) else kind
    mixer = build_module(spec, config=config, layer_number=1, pg_collection=groups, writes=("memory",))
    fill(mixer, tp_size, groups.tp.rank())
    return mixer


@torch.no_grad()
def fill(mixer: nn.Module, tp_size: int, rank: int) -> None:
    for name, p in mixer.named_parameters():
        generator = torch.Generator().manual_seed(sum(name.encode()))
        shape = list(p.shape)
        shape[p.partition_dim] *= tp_size
        values = torch.randn(shape, generator=generator) * (0.5 if p.dim() > 1 else 1.0)
        p.copy_(partition(values, p.partition_dim, blocks_of(p, tp_size), tp_size, rank))


def inputs() -> dict[str, Tensor]:
    """Hidden states, a memory for the GMU, document starts, and the gradients of output and memory."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"hidden": HIDDEN, "memory": MEMORY_SIZE, "grad_output": HIDDEN, "grad_memory": MEMORY_SIZE}
    tensors = {name: torch.randn(LENGTH, BATCH, d, generator=generator) for name, d in shapes.items()}
    return tensors | {"starts": torch.rand(LENGTH, BATCH, generator=generator) < 0.1}


def run(mixer: Any, hidden: Tensor, memory: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Output and memory."""
    state = SharedState(memory=memory)
    output, _ = mixer(hidden, state, SequenceContext(document_starts=starts))
    return output, state.memory  # type: ignore[return-value]
