"""Mamba-1 mixer (arXiv 2312.00752, section 3) under tensor and sequence parallelism."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)
from megatron.core.utils import divide
from torch import Tensor, nn
from torch.nn import functional as F

from archscale_megatron.archs.architecture import Payload
from archscale_megatron.layers.backend import build_in_proj, build_out_proj, parameter_options
from archscale_megatron.layers.shared_state import SequenceContext, SharedState
from archscale_megatron.ops.causal_conv import causal_conv1d
from archscale_megatron.ops.selective_scan import selective_scan

# Which dimension of a parameter is split over the TP ranks, where Megatron's linears do not say so.
PARTITION_DIM = {
    "conv1d.weight": 0, "conv1d.bias": 0, "x_proj.weight": 1, "dt_proj.weight": 0, "dt_proj.bias": 0,
    "A_log": 0, "D": 0,
}  # fmt: skip
# The recurrence is sensitive to these: they stay in fp32 whatever the precision of the model.
FP32_PARAMETERS = ("A_log", "D", "dt_proj.bias")


class CausalConv1d(nn.Conv1d):
    """The depthwise causal convolution with its silu. A module that is called, like StepSizeProjection, because DDP
    waits for the parameters of a module when it is called (--overlap-param-gather)."""

    def forward(self, x: Tensor, document_starts: Tensor | None) -> Tensor:  # type: ignore[override]
        """x [s, b, d] -> [s, b, d]."""
        return causal_conv1d(x, self.weight, self.bias, document_starts=document_starts)


class StepSizeProjection(nn.Linear):
    """dt_proj, without its bias: the scan adds that, in fp32."""

    def forward(self, dt: Tensor) -> Tensor:
        """dt [s, b, dt_rank] -> [s, b, d]."""
        return F.linear(dt, self.weight)


@dataclass
class Mamba1MixerSubmodules:
    in_proj: type
    out_proj: type


class Mamba1Mixer(MegatronModule):
    """out_proj(silu(z) * y) with y the selective scan of silu(conv(x)), and [x | z] = in_proj(input).

    The d_inner channels are split over the TP ranks: in_proj is column-parallel with matching slices of x
    and z, conv, dt_proj, A and D are split alike, and out_proj is row-parallel. Only x_proj, whose output
    (dt, B, C) every channel needs, sums over the ranks: forward once, and backward once.

    When it writes the shared state, the memory is y: with the D * x term, before the gate.

    Args:
        d_inner, dt_rank, state_size, conv_kernel: as in the paper; d_inner over all TP ranks.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: Mamba1MixerSubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        writes: Payload,
        d_inner: int,
        dt_rank: int,
        state_size: int,
        conv_kernel: int,
    ) -> None:
        super().__init__(config)
        self.writes_memory = "memory" in writes
        self.tp_group = pg_collection.tp
        self.dt_rank, self.state_size = dt_rank, state_size
        d_local = divide(d_inner, self.tp_group.size())
        options = parameter_options(config)
        fp32 = options | {"dtype": torch.float32}

        # Two blocks: each rank holds a slice of x and one of z.
        self.in_proj = build_in_proj(
            submodules.in_proj, config.hidden_size, 2 * d_inner, config, self.tp_group, stride=2
        )
        self.conv1d = CausalConv1d(d_local, d_local, conv_kernel, groups=d_local, **options)
        self.x_proj = nn.Linear(d_local, dt_rank + 2 * state_size, bias=False, **options)
        self.dt_proj = StepSizeProjection(dt_rank, d_local, bias=False, **options)
        self.dt_proj.bias = nn.Parameter(torch.empty(d_local, **fp32))
        self.A_log = nn.Parameter(torch.empty(d_local, state_size, **fp32))
        self.D = nn.Parameter(torch.empty(d_local, **fp32))
        self.out_proj = build_out_proj(submodules.out_proj, d_inner, config.hidden_size, config, self.tp_group)
        for name, dim in PARTITION_DIM.items():
            set_tensor_model_parallel_attributes(self.get_parameter(name), True, dim, 1)

    def _apply(self, fn: Any, recurse: bool = True) -> Mamba1Mixer:
        """Keeps FP32_PARAMETERS in fp32 when the model is cast (Float16Module calls `.bfloat16()`)."""
        kept = {name: self.get_parameter(name).data for name in FP32_PARAMETERS}
        super()._apply(fn, recurse)
        for name, data in kept.items():
            parameter = self.get_parameter(name)
            if parameter.dtype != torch.float32:
                parameter.data = data.to(parameter.device)
        return self

    def forward(
        self, hidden_states: Tensor, state: SharedState, context: SequenceContext
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [s, b, h] (s / tp under sequence parallelism) -> the same shape."""
        xz, _ = self.in_proj(hidden_states)
        x, z = xz.chunk(2, dim=-1)
        x = self.conv1d(x, context.document_starts)
        dt_B_C = reduce_from_tensor_model_parallel_region(self.x_proj(x), self.tp_group)
        dt_B_C = copy_to_tensor_model_parallel_region(dt_B_C, self.tp_group)
        dt, B, C = dt_B_C.split([self.dt_rank, self.state_size, self.state_size], dim=-1)
        y = selective_scan(
            x,
            self.dt_proj(dt),
            -torch.exp(self.A_log),
            B,
            C,
            self.D,
            dt_bias=self.dt_proj.bias,
            document_starts=context.document_starts,
        )
        if self.writes_memory:
            state.memory = y
        return self.out_proj((F.silu(z.float()) * y).to(z.dtype))

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Every parameter as one global tensor; in_proj as [x | z], whatever the TP size."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        own = {name: parameter for name, parameter in self.named_parameters() if name in PARTITION_DIM}
        sharded = make_sharded_tensors_for_checkpoint(
            own,
            prefix,
            PARTITION_DIM,
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        for name in ("in_proj", "out_proj"):
            linear = getattr(self, name)
            sharded |= sharded_state_dict_default(linear, f"{prefix}{name}.", sharded_offsets, metadata)
        key = f"{prefix}in_proj.weight"
        sharded[key] = apply_swiglu_sharded_factory(
            sharded[key], sharded_offsets, metadata.get("singleton_local_shards", False)
        )
        return sharded


def mamba1_spec(
    backend: BackendSpecProvider, d_inner: int, dt_rank: int, state_size: int, conv_kernel: int
) -> ModuleSpec:
    """The spec of a Mamba-1 layer's mixer."""
    submodules = Mamba1MixerSubmodules(in_proj=backend.column_parallel_linear(), out_proj=backend.row_parallel_linear())
    params = {"d_inner": d_inner, "dt_rank": dt_rank, "state_size": state_size, "conv_kernel": conv_kernel}
    return ModuleSpec(module=Mamba1Mixer, submodules=submodules, params=params)
