"""Mamba-2 mixer (arXiv 2405.21060, section 7) under tensor and sequence parallelism."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import divide
from torch import Tensor, nn

from archscale_megatron.archs.architecture import Payload
from archscale_megatron.layers.backend import build_in_proj, build_out_proj, parameter_options
from archscale_megatron.layers.norm import GatedRMSNorm
from archscale_megatron.layers.recurrent import CausalConv1d, RecurrentMixer
from archscale_megatron.layers.shared_state import SequenceContext, SharedState
from archscale_megatron.ops.ssd import ssd


@dataclass
class Mamba2MixerSubmodules:
    in_proj: type
    out_proj: type


class Mamba2Mixer(RecurrentMixer):
    """out_proj(norm(y * silu(z))) with y the scan of x, and [x | B | C] = silu(conv(.)), z and dt from in_proj.

    The heads are split over the TP ranks. All heads share one group of B and C, of which each rank projects and
    convolves a slice; then the slices are gathered: forward once, and summed over the ranks backward once.

    When it writes the shared state, the memory is y: with the D * x term, before the gate and the norm.

    Megatron's MambaMixer has the same parameters, but needs a group of B and C on every rank, norms each group's
    channels on their own, and does not give y away.

    Args:
        heads, head_dim, state_size, conv_kernel: as in the paper; heads over all TP ranks.
    """

    fp32_parameters = ("A_log", "D", "dt_bias")

    def __init__(
        self,
        config: TransformerConfig,
        submodules: Mamba2MixerSubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        writes: Payload,
        heads: int,
        head_dim: int,
        state_size: int,
        conv_kernel: int,
    ) -> None:
        super().__init__(config)
        self.writes_memory = "memory" in writes
        self.tp_group = pg_collection.tp
        self.head_dim = head_dim
        ranks, d_inner = self.tp_group.size(), heads * head_dim
        self.heads, self.d_inner = divide(heads, ranks), divide(heads, ranks) * head_dim  # of this rank
        self.state_size = divide(state_size, ranks)
        convolved = {"x": d_inner, "B": state_size, "C": state_size}
        projected = {"z": d_inner} | convolved | {"dt": heads}
        options = parameter_options(config)
        fp32 = options | {"dtype": torch.float32}

        self.in_proj = build_in_proj(
            submodules.in_proj, config.hidden_size, sum(projected.values()), config, self.tp_group
        )
        self.conv1d = CausalConv1d(sum(convolved.values()) // ranks, conv_kernel, **options)
        self.A_log, self.D, self.dt_bias = (nn.Parameter(torch.empty(self.heads, **fp32)) for _ in range(3))
        self.norm = GatedRMSNorm(config, d_inner, self.tp_group)
        self.out_proj = build_out_proj(submodules.out_proj, d_inner, config.hidden_size, config, self.tp_group)
        self.partition("in_proj.weight", blocks=projected)
        self.partition("conv1d.weight", blocks=convolved)
        self.partition("conv1d.bias", blocks=convolved)
        for name in self.fp32_parameters:
            self.partition(name)

    def forward(
        self, hidden_states: Tensor, state: SharedState, context: SequenceContext
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [s, b, h] (s / tp under sequence parallelism) -> the same shape."""
        projected, _ = self.in_proj(hidden_states)
        z, x_B_C, dt = projected.split([self.d_inner, self.d_inner + 2 * self.state_size, self.heads], dim=-1)
        x, B_C = self.conv1d(x_B_C, context.document_starts).split([self.d_inner, 2 * self.state_size], dim=-1)
        B_C = gather_from_tensor_model_parallel_region(B_C.unflatten(-1, (2, -1)), self.tp_group)
        B, C = copy_to_tensor_model_parallel_region(B_C, self.tp_group).unbind(-2)
        y = ssd(
            x.unflatten(-1, (-1, self.head_dim)),
            dt,
            -torch.exp(self.A_log),
            B,
            C,
            self.D,
            dt_bias=self.dt_bias,
            document_starts=context.document_starts,
        ).flatten(2)
        if self.writes_memory:
            state.memory = y
        return self.out_proj(self.norm(y, z))


def mamba2_spec(
    backend: BackendSpecProvider, heads: int, head_dim: int, state_size: int, conv_kernel: int
) -> ModuleSpec:
    """The spec of a Mamba-2 layer's mixer."""
    submodules = Mamba2MixerSubmodules(in_proj=backend.column_parallel_linear(), out_proj=backend.row_parallel_linear())
    params = {"heads": heads, "head_dim": head_dim, "state_size": state_size, "conv_kernel": conv_kernel}
    return ModuleSpec(module=Mamba2Mixer, submodules=submodules, params=params)
