"""Norms for a residual stream of another dtype than the weights, safe under sequence parallelism; and a gated one.

Megatron's local norms refuse sequence parallelism, and Transformer Engine's round a fp32 residual stream to bf16 before
they normalise; these do neither.
"""

from __future__ import annotations

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from megatron.core.utils import divide
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from archscale_megatron.layers.backend import parameter_options
from archscale_megatron.ops.norm import gated_rms_norm, norm


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in x's dtype, cast to the parameters'."""

    bias: Tensor | None

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, **parameter_options(config)))
        # Each rank sees its own tokens, so Megatron must sum this gradient over the TP group.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.register_parameter("bias", None)

    def forward(self, x: Tensor, with_residual: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """[..., hidden_size] in any float dtype -> the same shape in the weights' dtype; with the residual: and x,
        which whoever adds to it should take from here, for the sum of its gradients (`ops.norm`)."""
        normed, residual = norm(x, self.weight, self.bias, self.eps)
        return (normed, residual) if with_residual else normed


class LayerNorm(RMSNorm):
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last dimension, likewise."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(config, hidden_size, eps)
        self.bias = nn.Parameter(torch.zeros(hidden_size, **parameter_options(config)))
        self.bias.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def norm_class(config: TransformerConfig) -> type[RMSNorm]:
    """The norm of the residual stream that `config.normalization` names."""
    return {"RMSNorm": RMSNorm, "LayerNorm": LayerNorm}[config.normalization]


class GatedRMSNorm(nn.Module):
    """RMSNorm(x * silu(gate)) * weight over all `size` channels, which the TP ranks share (as in arXiv 2405.21060).

    In fp32. The mean of squares is summed over the ranks: forward once, and its gradient backward once.
    """

    def __init__(self, config: TransformerConfig, size: int, tp_group: ProcessGroup) -> None:
        super().__init__()
        self.eps, self.tp_group = config.layernorm_epsilon, tp_group
        self.weight = nn.Parameter(torch.ones(divide(size, tp_group.size()), **parameter_options(config)))
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """x, gate [..., size / tp] -> the same shape in the weights' dtype."""
        return gated_rms_norm(x, gate, self.weight, self.eps, self.tp_group.size(), self._sum_over_ranks)

    def _sum_over_ranks(self, squares: Tensor) -> Tensor:
        squares = reduce_from_tensor_model_parallel_region(squares, self.tp_group)
        return copy_to_tensor_model_parallel_region(squares, self.tp_group)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """The weight as one global tensor."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        return make_sharded_tensors_for_checkpoint(
            {"weight": self.weight},
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
