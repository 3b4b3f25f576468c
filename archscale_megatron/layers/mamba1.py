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
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import divide
from torch import Tensor, nn
from torch.nn import functional as F

from archscale_megatron.archs.architecture import Payload
from archscale_megatron.layers.backend import build_in_proj, build_out_proj, parameter_options
from archscale_megatron.layers.recurrent import CausalConv1d, RecurrentMixer
from archscale_megatron.layers.shared_state import SequenceContext, SharedState
from archscale_megatron.ops.gate import silu_gate
from archscale_megatron.ops.selective_scan import selective_scan


class ScanInputProjection(nn.Linear):
    """x_proj: dt, B and C of each token, side by side."""

    def __init__(self, d: int, dt_rank: int, state_size: int, **options: Any) -> None:
        super().__init__(d, dt_rank + 2 * state_size, bias=False, **options)
        self.dt_rank = dt_rank

    def forward(self, x: Tensor) -> Tensor:
        """x [s, b, d] -> [s, b, dt_rank + padding + 2 * state_size], zeros behind dt."""
        weight, padding = self.weight, _padding(self.dt_rank, x)
        if padding:
            dt, B_C = weight.split([self.dt_rank, self.out_features - self.dt_rank])
            weight = torch.cat([dt, weight.new_zeros(padding, weight.shape[1]), B_C])
        return F.linear(x, weight)


class StepSizeProjection(nn.Linear):
    """dt_proj, without its bias: the scan adds that, in fp32. A module that is called, like CausalConv1d."""

    def forward(self, dt: Tensor) -> Tensor:
        """dt [s, b, dt_rank + padding] -> [s, b, d]."""
        padding = dt.shape[-1] - self.in_features
        return F.linear(dt, F.pad(self.weight, (0, padding)) if padding else self.weight)


def _padding(width: int, x: Tensor) -> int:
    """What `width` lacks of a multiple of 8, below which the matrix products of a GPU have slow kernels alone."""
    return -width % 8 if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) else 0


@dataclass
class Mamba1MixerSubmodules:
    in_proj: type
    out_proj: type


class Mamba1Mixer(RecurrentMixer):
    """out_proj(silu(z) * y) with y the selective scan of silu(conv(x)), and [x | z] = in_proj(input).

    The d_inner channels are split over the TP ranks: in_proj is column-parallel with matching slices of x
    and z, conv, dt_proj, A and D are split alike, and out_proj is row-parallel. Only x_proj, whose output
    (dt, B, C) every channel needs, sums over the ranks: forward once, and backward once.

    When it writes the shared state, the memory is y: with the D * x term, before the gate.

    Args:
        d_inner, dt_rank, state_size, conv_kernel: as in the paper; d_inner over all TP ranks.
    """

    fp32_parameters = ("A_log", "D", "dt_proj.bias")

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
        self.state_size = state_size
        d_local = divide(d_inner, self.tp_group.size())
        options = parameter_options(config)
        fp32 = options | {"dtype": torch.float32}

        # Two blocks: each rank holds a slice of x and one of z.
        self.in_proj = build_in_proj(
            submodules.in_proj, config.hidden_size, 2 * d_inner, config, self.tp_group, stride=2
        )
        self.conv1d = CausalConv1d(d_local, conv_kernel, **options)
        self.x_proj = ScanInputProjection(d_local, dt_rank, state_size, **options)
        self.dt_proj = StepSizeProjection(dt_rank, d_local, bias=False, **options)
        self.dt_proj.bias = nn.Parameter(torch.empty(d_local, **fp32))
        self.A_log = nn.Parameter(torch.empty(d_local, state_size, **fp32))
        self.D = nn.Parameter(torch.empty(d_local, **fp32))
        self.out_proj = build_out_proj(submodules.out_proj, d_inner, config.hidden_size, config, self.tp_group)
        for name in ("conv1d.weight", "conv1d.bias", "dt_proj.weight", *self.fp32_parameters):
            self.partition(name)
        self.partition("x_proj.weight", dim=1)

    def forward(
        self, hidden_states: Tensor, state: SharedState, context: SequenceContext
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [s, b, h] (s / tp under sequence parallelism) -> the same shape."""
        xz, _ = self.in_proj(hidden_states)
        x, z = xz.chunk(2, dim=-1)
        x = self.conv1d(x, context.document_starts)
        dt_B_C = reduce_from_tensor_model_parallel_region(self.x_proj(x), self.tp_group)
        dt_B_C = copy_to_tensor_model_parallel_region(dt_B_C, self.tp_group)
        n = self.state_size
        # Not tensor_split, whose backward pass fills a whole gradient with zeros for each part, and adds them up.
        dt, B, C = dt_B_C.split([dt_B_C.shape[-1] - 2 * n, n, n], dim=-1)
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
        return self.out_proj(silu_gate(z, y))

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Every parameter as one global tensor; in_proj as [x | z], whatever the TP size."""
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        key = f"{prefix}in_proj.weight"
        separate = (metadata or {}).get("singleton_local_shards", False)
        sharded[key] = apply_swiglu_sharded_factory(sharded[key], sharded_offsets, separate)
        return sharded


def mamba1_spec(
    backend: BackendSpecProvider, d_inner: int, dt_rank: int, state_size: int, conv_kernel: int
) -> ModuleSpec:
    """The spec of a Mamba-1 layer's mixer."""
    submodules = Mamba1MixerSubmodules(in_proj=backend.column_parallel_linear(), out_proj=backend.row_parallel_linear())
    params = {"d_inner": d_inner, "dt_rank": dt_rank, "state_size": state_size, "conv_kernel": conv_kernel}
    return ModuleSpec(module=Mamba1Mixer, submodules=submodules, params=params)
