"""Differential attention (arXiv 2410.05258): what one attention map sees and its neighbour does not."""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from archscale_megatron.layers.backend import parameter_options
from archscale_megatron.layers.core_attention import CoreAttention
from archscale_megatron.layers.norm import RMSNorm
from archscale_megatron.ops.norm import norm


class PairNorm(RMSNorm):
    """RMSNorm of a pair of heads. Each TP rank norms its own pairs with the same weight, whose gradient is therefore
    summed over the ranks, with sequence parallelism or without."""

    def __init__(self, config: TransformerConfig, hidden_size: int, tp_group: ProcessGroup) -> None:
        super().__init__(config, hidden_size)
        self.tp_group = tp_group
        self.weight.sequence_parallel = False  # type: ignore[attr-defined]  # not to be summed twice

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # without a residual
        """[..., hidden_size] -> the same shape and dtype, which are the weight's."""
        return norm(x, copy_to_tensor_model_parallel_region(self.weight, self.tp_group), None, self.eps)[0]


class DifferentialAttention(CoreAttention):
    """norm(A1 v - lambda A2 v) (1 - lambda_init) of each pair of adjacent heads, which then part again.

    A1 and A2 are the pair's softmax maps, v the values of a pair of adjacent key-value heads side by side, and

        lambda = exp(lambda_q1 . lambda_k1) - exp(lambda_q2 . lambda_k2) + lambda_init
        lambda_init = 0.8 - 0.6 exp(-0.3 i), i the index of the ArchScale layer in the whole model, from 0.

    The lambda vectors [d] and the norm's weight [2 d] are one set a layer, the same on all TP ranks.
    """

    def __init__(
        self, config: TransformerConfig, layer_number: int, pg_collection: ProcessGroupCollection, **options: Any
    ) -> None:
        super().__init__(config, pg_collection, **options)
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * ((layer_number - 1) // 2))  # two hybrid layers a layer
        head_dim = config.kv_channels
        for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
            self.register_parameter(name, nn.Parameter(torch.empty(head_dim, **parameter_options(config))))
        self.sub_norm = PairNorm(config, 2 * head_dim, self.tp_group)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, document_starts: Tensor | None) -> Tensor:
        """query [s, b, heads / tp, d], key and value [s, b, kv_heads / tp, d] -> [s, b, heads / tp, d]."""
        # One call for both maps: the first heads of all pairs, then the second ones, over the same values.
        query, key = (torch.cat([x[:, :, 0::2], x[:, :, 1::2]], dim=2) for x in (query, key))
        value = value.unflatten(2, (-1, 2)).flatten(3).repeat(1, 1, 2, 1)
        first, second = self._softmax_attention(query, key, value, document_starts).chunk(2, dim=2)
        pairs = self.sub_norm(first - self._lambda() * second) * (1 - self.lambda_init)
        return pairs.unflatten(-1, (2, -1)).flatten(2, 3)

    def _lambda(self) -> Tensor:
        """lambda, fp32. Each rank multiplies it with its own heads, so its gradient is summed over the ranks."""
        first = (self.lambda_q1.float() * self.lambda_k1.float()).sum().exp()
        second = (self.lambda_q2.float() * self.lambda_k2.float()).sum().exp()
        return copy_to_tensor_model_parallel_region(first - second + self.lambda_init, self.tp_group)
