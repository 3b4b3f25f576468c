"""RMSNorm for a residual stream of another dtype than the weights, safe under sequence parallelism."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional as F

from archscale_megatron.layers.backend import parameter_options


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in x's dtype, cast to the parameters'.

    Megatron's local norm refuses sequence parallelism, and Transformer Engine's rounds a fp32 residual
    stream to bf16 before it normalises; this one does neither.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, **parameter_options(config)))
        # Each rank sees its own tokens, so Megatron must sum this gradient over the TP group.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] in any float dtype -> the same shape in the weights' dtype."""
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps).to(self.weight.dtype)
