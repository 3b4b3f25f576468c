"""Norms for a residual stream of another dtype than the weights, safe under sequence parallelism.

Megatron's local norms refuse sequence parallelism, and Transformer Engine's round a fp32 residual stream to bf16 before
they normalise; these do neither.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional as F

from archscale_megatron.layers.backend import parameter_options


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in x's dtype, cast to the parameters'."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, **parameter_options(config)))
        # Each rank sees its own tokens, so Megatron must sum this gradient over the TP group.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] in any float dtype -> the same shape in the weights' dtype."""
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps).to(self.weight.dtype)


class LayerNorm(RMSNorm):
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last dimension, likewise."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(config, hidden_size, eps)
        self.bias = nn.Parameter(torch.zeros(hidden_size, **parameter_options(config)))
        self.bias.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] in any float dtype -> the same shape in the weights' dtype."""
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, weight.shape, weight, bias, self.eps).to(self.weight.dtype)


def norm_class(config: TransformerConfig) -> type[RMSNorm]:
    """The norm of the residual stream that `config.normalization` names."""
    return {"RMSNorm": RMSNorm, "LayerNorm": LayerNorm}[config.normalization]
