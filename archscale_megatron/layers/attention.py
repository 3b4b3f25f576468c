"""Attention mixers: full or sliding-window self-attention, and cross attention to keys and values that an
earlier layer left in the shared state (YOCO, arXiv 2405.05254)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.attention import (
    Attention,
    CrossAttentionSubmodules,
    SelfAttention,
    SelfAttentionSubmodules,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from archscale_megatron.archs.architecture import Options, Payload
from archscale_megatron.layers.backend import Linear, build_in_proj, with_bias
from archscale_megatron.layers.core_attention import CoreAttention
from archscale_megatron.layers.differential_attention import DifferentialAttention
from archscale_megatron.layers.norm import RMSNorm
from archscale_megatron.layers.shared_state import SequenceContext, SharedState
from archscale_megatron.ops.gate import head_gate
from archscale_megatron.ops.rotary import rotate


class _AttentionMixer(Attention):
    """What both kinds share: RoPE, core attention, recomputed when asked for, and the gate of its heads."""

    def _build_gate(self, linear: Linear | None) -> None:
        sizes = self.config.hidden_size, self.config.num_attention_heads
        self.linear_gate = None if linear is None else build_in_proj(linear, *sizes, self.config, self.tp_group)

    def _attend(
        self, hidden_states: Tensor, query: Tensor, key: Tensor, value: Tensor, context: SequenceContext
    ) -> Tensor:
        """[s, b, heads / tp, d] each, and the layer's input for the gate -> [s, b, heads * d / tp]."""
        # Starts are bound, since a checkpoint hands copies of its inputs to the second pass: see `once_per_starts`.
        attend = partial(self.core_attention, document_starts=context.document_starts)
        if self.checkpoint_core_attention and self.training:
            heads = tensor_parallel.checkpoint(attend, False, query, key, value)
        else:
            heads = attend(query, key, value)
        if self.linear_gate is not None:
            gate, _ = self.linear_gate(hidden_states)  # [s, b, heads / tp]
            heads = head_gate(gate, heads)
        return heads.flatten(2)

    def _rotate(self, x: Tensor, context: SequenceContext) -> Tensor:
        if context.rotation is None:
            return x
        return rotate(x, *context.rotation)


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
        linear_gate: Linear | None,
    ) -> None:
        super().__init__(config, submodules, layer_number, AttnMaskType.causal, pg_collection=pg_collection)
        self._build_gate(linear_gate)
        self.writes = writes

    def forward(
        self, hidden_states: Tensor, state: SharedState, context: SequenceContext
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [s, b, h] -> [s, b, h]."""
        query, key, value = self.get_query_key_value_tensors(hidden_states)
        query, key = self._rotate(query, context), self._rotate(key, context)
        if "kv" in self.writes:
            state.key, state.value = key, value
        output = self._attend(hidden_states, query, key, value, context)
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
        linear_gate: Linear | None,
    ) -> None:
        super().__init__(config, submodules, layer_number, AttnMaskType.causal, "cross", pg_collection=pg_collection)
        self._build_gate(linear_gate)
        self.linear_q = build_in_proj(
            submodules.linear_q, config.hidden_size, self.query_projection_size, config, self.tp_group
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
        return self.linear_proj(self._attend(hidden_states, self._rotate(query, context), key, value, context))


def self_attention_spec(backend: BackendSpecProvider, window: int | None, options: Options) -> ModuleSpec:
    """The spec of a self-attention layer's mixer; `window` counts the current token, None is all."""
    norm = RMSNorm if options.qk_norm else None
    submodules = SelfAttentionSubmodules(
        linear_qkv=with_bias(backend.column_parallel_linear(), options.qkv_bias),
        core_attention=_core_attention(window, options),
        linear_proj=with_bias(backend.row_parallel_linear(), options.attention_output_bias),
        # Each TP rank norms its own heads; Megatron sums the gradients of norms with these names over the ranks.
        q_layernorm=norm,
        k_layernorm=norm,
    )
    return ModuleSpec(module=SelfAttentionMixer, submodules=submodules, params={"linear_gate": _gate(options)})


def cross_attention_spec(backend: BackendSpecProvider, window: int | None, options: Options) -> ModuleSpec:
    """The spec of a cross-attention layer's mixer; `window` as above."""
    submodules = CrossAttentionSubmodules(
        linear_q=with_bias(backend.column_parallel_linear(), options.qkv_bias),
        linear_kv=torch.nn.Identity,  # it has none: the shared state brings the keys and values
        core_attention=_core_attention(window, options),
        linear_proj=with_bias(backend.row_parallel_linear(), options.attention_output_bias),
    )
    return ModuleSpec(module=CrossAttentionMixer, submodules=submodules, params={"linear_gate": _gate(options)})


def _core_attention(window: int | None, options: Options) -> partial[CoreAttention]:
    if options.differential_attention:
        return partial(DifferentialAttention, window=window)
    return partial(CoreAttention, window=window, sink=options.attention_sink)


def _gate(options: Options) -> Linear | None:
    """Megatron's own linear in any backend: so few channels are no FP8 product."""
    return with_bias(ColumnParallelLinear, options.qkv_bias) if options.attention_gate else None
