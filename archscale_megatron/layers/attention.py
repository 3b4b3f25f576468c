"""Attention mixers: full or sliding-window self-attention, and cross attention to keys and values that an
earlier layer left in the shared state (YOCO, arXiv 2405.05254)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import (
    Attention,
    CrossAttentionSubmodules,
    SelfAttention,
    SelfAttentionSubmodules,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from archscale_megatron.archs.architecture import Payload
from archscale_megatron.layers.shared_state import SequenceContext, SharedState
from archscale_megatron.ops.attention import attention


class CoreAttention(MegatronModule):
    """softmax(q.k / sqrt(d)) v over the causal window: our op in the place of Megatron's own,
    which builds all s x s scores unless Transformer Engine is there."""

    def __init__(
        self,
        config: TransformerConfig,
        softmax_scale: float | None = None,
        window: int | None = None,
        **_: Any,  # layer_number, attn_mask_type, ...: what other core attentions need to be told
    ) -> None:
        super().__init__(config)
        self.window = window
        self.softmax_scale = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, document_starts: Tensor | None) -> Tensor:
        """query [s, b, heads / tp, d], key and value [s, b, kv_heads / tp, d] -> [s, b, heads * d / tp]."""
        dropout = self.config.attention_dropout if self.training else 0.0
        attend = partial(
            attention,
            query, key, value,
            softmax_scale=self.softmax_scale, window=self.window, document_starts=document_starts,
        )  # fmt: skip
        if dropout:
            # Each TP rank draws its own mask: its heads are its own.
            with tensor_parallel.get_cuda_rng_tracker().fork():
                return attend(dropout_p=dropout).flatten(2)
        return attend().flatten(2)


class _AttentionMixer(Attention):
    """What both kinds share: RoPE, and core attention, recomputed when asked for."""

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, context: SequenceContext) -> Tensor:
        inputs = (query, key, value, context.document_starts)
        if self.checkpoint_core_attention and self.training:
            return tensor_parallel.checkpoint(self.core_attention, False, *inputs)
        return self.core_attention(*inputs)

    def _rotate(self, x: Tensor, context: SequenceContext) -> Tensor:
        if context.rotary_pos_emb is None:
            return x
        return apply_rotary_pos_emb(x, context.rotary_pos_emb, config=self.config, cp_group=self.pg_collection.cp)


class SelfAttentionMixer(SelfAttention, _AttentionMixer):
    """Megatron's self-attention, its projections and norms, with our core attention.

    It may write its keys and values, which later cross attentions read, and its output before the projection, which
    is then the memory of later GMUs.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        writes: Payload,
    ) -> None:
        super().__init__(config, submodules, layer_number, AttnMaskType.causal, pg_collection=pg_collection)
        self.writes = writes

    def forward(
        self, hidden_states: Tensor, state: SharedState, context: SequenceContext
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [s, b, h] -> [s, b, h]."""
        query, key, value = self.get_query_key_value_tensors(hidden_states)
        query, key = self._rotate(query, context), self._rotate(key, context)
        if "kv" in self.writes:
            state.key, state.value = key, value
        output = self._attend(query, key, value, context)
        if "memory" in self.writes:
            state.memory = output
        return self.linear_proj(output)


class CrossAttentionMixer(_AttentionMixer):
    """Causal attention with this layer's queries to the keys and values of the shared state."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: CrossAttentionSubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        writes: Payload,
    ) -> None:
        super().__init__(config, submodules, layer_number, AttnMaskType.causal, "cross", pg_collection=pg_collection)
        self.linear_q = submodules.linear_q(
            config.hidden_size,
            self.query_projection_size,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=config.add_bias_linear or config.add_qkv_bias,
            skip_bias_add=False,
            is_expert=False,
            tp_group=pg_collection.tp,
        )

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: Any = None,
        output_gate: Any = None,
        split_qkv: Any = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """hidden_states [s, b, h], (key, value) of the shared state -> query, key, value."""
        query, _ = self.linear_q(hidden_states)
        query = query.unflatten(-1, (-1, self.hidden_size_per_attention_head))
        return query, *key_value_states

    def forward(
        self, hidden_states: Tensor, state: SharedState, context: SequenceContext
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [s, b, h] -> [s, b, h]."""
        query, key, value = self.get_query_key_value_tensors(hidden_states, (state.key, state.value))
        return self.linear_proj(self._attend(self._rotate(query, context), key, value, context))


def self_attention_spec(backend: BackendSpecProvider, window: int | None) -> ModuleSpec:
    """The spec of a self-attention layer's mixer; `window` counts the current token, None is all."""
    submodules = SelfAttentionSubmodules(
        linear_qkv=backend.column_parallel_linear(),
        core_attention=partial(CoreAttention, window=window),
        linear_proj=backend.row_parallel_linear(),
    )
    return ModuleSpec(module=SelfAttentionMixer, submodules=submodules)


def cross_attention_spec(backend: BackendSpecProvider, window: int | None) -> ModuleSpec:
    """The spec of a cross-attention layer's mixer; `window` as above."""
    submodules = CrossAttentionSubmodules(
        linear_q=backend.column_parallel_linear(),
        linear_kv=torch.nn.Identity,  # it has none: the shared state brings the keys and values
        core_attention=partial(CoreAttention, window=window),
        linear_proj=backend.row_parallel_linear(),
    )
    return ModuleSpec(module=CrossAttentionMixer, submodules=submodules)
