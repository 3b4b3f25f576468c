"""Gated DeltaNet mixer (arXiv 2412.06464, section 3.4) under tensor and sequence parallelism."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import divide
from torch import Tensor, nn
from torch.nn import functional as F

from archscale_megatron.archs.architecture import Payload
from archscale_megatron.layers.backend import build_in_proj, build_out_proj, parameter_options
from archscale_megatron.layers.norm import GatedRMSNorm
from archscale_megatron.layers.recurrent import CausalConv1d, RecurrentMixer
from archscale_megatron.layers.shared_state import SequenceContext, SharedState
from archscale_megatron.ops.gated_delta_rule import gated_delta_rule


@dataclass
class GatedDeltaNetMixerSubmodules:
    in_proj: type
    out_proj: type


class GatedDeltaNetMixer(RecurrentMixer):
    """out_proj(norm(o * silu(z))) with o the gated delta rule of [q | k | v] = silu(conv(.)), and with z, beta and
    alpha from in_proj: beta = 2 sigmoid(.), log decay = -exp(A_log) softplus(alpha + dt_bias).

    The heads are split over the TP ranks; only the norm sums over them. Values are twice as large as keys.

    When it writes the shared state, the memory is o: before the gate and the norm.

    Megatron's GatedDeltaNet has the same parameters, but a beta of at most 1 and a norm of each head before the gate.

    Args:
        heads, head_dim, conv_kernel: heads over all TP ranks, and the size of each one's key.
    """

    fp32_parameters = ("A_log", "dt_bias")

    def __init__(
        self,
        config: TransformerConfig,
        submodules: GatedDeltaNetMixerSubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        writes: Payload,
        heads: int,
        head_dim: int,
        conv_kernel: int,
    ) -> None:
        super().__init__(config)
        self.writes_memory = "memory" in writes
        self.tp_group = pg_collection.tp
        ranks, keys, values = self.tp_group.size(), heads * head_dim, 2 * heads * head_dim
        self.heads, self.head_dim = divide(heads, ranks), head_dim
        convolved = {"query": keys, "key": keys, "value": values}
        projected = convolved | {"z": values, "beta": heads, "alpha": heads}
        options = parameter_options(config)
        fp32 = options | {"dtype": torch.float32}

        self.in_proj = build_in_proj(
            submodules.in_proj, config.hidden_size, sum(projected.values()), config, self.tp_group
        )
        self.conv1d = CausalConv1d(sum(convolved.values()) // ranks, conv_kernel, bias=False, **options)
        self.A_log, self.dt_bias = (nn.Parameter(torch.empty(self.heads, **fp32)) for _ in range(2))
        self.norm = GatedRMSNorm(config, values, self.tp_group)
        self.out_proj = build_out_proj(submodules.out_proj, values, config.hidden_size, config, self.tp_group)
        self.partition("in_proj.weight", blocks=projected)
        weight: Any = self.in_proj.weight  # to Muon, each block is a matrix, as in ArchScale
        weight.is_qkv, weight.qkv_split_shapes = True, [size // ranks for size in projected.values()]
        self.partition("conv1d.weight", blocks=convolved)
        for name in self.fp32_parameters:
            self.partition(name)

    def forward(
        self, hidden_states: Tensor, state: SharedState, context: SequenceContext
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [s, b, h] (s / tp under sequence parallelism) -> the same shape."""
        keys = self.heads * self.head_dim
        projected, _ = self.in_proj(hidden_states)
        qkv, z, beta, alpha = projected.split([4 * keys, 2 * keys, self.heads, self.heads], dim=-1)
        qkv = self.conv1d(qkv, context.document_starts)
        q, k, v = (x.unflatten(-1, (self.heads, -1)) for x in qkv.split([keys, keys, 2 * keys], dim=-1))
        o = gated_delta_rule(
            q,
            k,
            v,
            -torch.exp(self.A_log) * F.softplus(alpha.float() + self.dt_bias),
            2 * torch.sigmoid(beta.float()),
            document_starts=context.document_starts,
        ).flatten(2)
        if self.writes_memory:
            state.memory = o
        return self.out_proj(self.norm(o, z))


def gated_delta_net_spec(backend: BackendSpecProvider, heads: int, head_dim: int, conv_kernel: int) -> ModuleSpec:
    """The spec of a gated delta net layer's mixer."""
    submodules = GatedDeltaNetMixerSubmodules(
        in_proj=backend.column_parallel_linear(), out_proj=backend.row_parallel_linear()
    )
    params = {"heads": heads, "head_dim": head_dim, "conv_kernel": conv_kernel}
    return ModuleSpec(module=GatedDeltaNetMixer, submodules=submodules, params=params)
