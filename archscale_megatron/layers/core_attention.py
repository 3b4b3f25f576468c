"""Core attention, between the projections: our op in the place of Megatron's own, which builds all s x s scores unless
Transformer Engine is there."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from megatron.core.utils import divide
from torch import Tensor, nn

from archscale_megatron.layers.backend import parameter_options
from archscale_megatron.ops.attention import attention


class CoreAttention(MegatronModule):
    """softmax(q.k / sqrt(d)) v over the causal window.

    Args:
        window: tokens that a token sees, itself included; None is all.
        sink: whether each head has a learned logit that takes attention from the tokens (arXiv 2309.17453).
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        softmax_scale: float | None = None,
        window: int | None = None,
        sink: bool = False,
        **_: Any,  # layer_number, attn_mask_type, ...: what other core attentions need to be told
    ) -> None:
        super().__init__(config)
        self.tp_group = pg_collection.tp
        self.window = window
        self.softmax_scale = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale
        self.sink: nn.Parameter | None = None
        if sink:
            heads = divide(config.num_attention_heads, self.tp_group.size())
            self.sink = nn.Parameter(torch.empty(heads, **parameter_options(config)))
            set_tensor_model_parallel_attributes(self.sink, True, 0, 1)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, document_starts: Tensor | None) -> Tensor:
        """query [s, b, heads / tp, d], key and value [s, b, kv_heads / tp, d] -> [s, b, heads / tp, d]."""
        return self._softmax_attention(query, key, value, document_starts)

    def _softmax_attention(self, query: Tensor, key: Tensor, value: Tensor, document_starts: Tensor | None) -> Tensor:
        dropout = self.config.attention_dropout if self.training else 0.0
        attend = partial(
            attention,
            query, key, value,
            softmax_scale=self.softmax_scale, window=self.window, document_starts=document_starts, sink=self.sink,
        )  # fmt: skip
        if dropout:
            # Each TP rank draws its own mask: its heads are its own.
            with tensor_parallel.get_cuda_rng_tracker().fork():
                return attend(dropout_p=dropout)
        return attend()

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Megatron's, which takes parameters for replicas; the sink is split by heads."""
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.sink is not None:
            metadata = ensure_metadata_has_dp_cp_group(metadata)
            sharded |= make_sharded_tensors_for_checkpoint(
                {"sink": self.sink},
                prefix,
                {"sink": 0},
                sharded_offsets,
                tp_group=self.tp_group,
                dp_cp_group=metadata["dp_cp_group"],
            )
        return sharded
