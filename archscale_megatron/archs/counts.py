"""How many parameters an architecture has, and how many floating-point operations a token costs.

The parameter counts are exact. FLOPs count two per multiply-add, of the matrix products, the attention
scores inside the causal window, and the scans' recurrences; norms, activations and the optimizer are left out.
"""

from __future__ import annotations

from archscale_megatron.archs.architecture import (
    CROSS_ATTENTION,
    FULL_ATTENTION,
    GATED_DELTA_NET,
    GMU,
    MAMBA1,
    MAMBA2,
    MLP,
    MOE,
    WINDOW_ATTENTION,
    Architecture,
)


def layer_parameters(arch: Architecture, symbol: str) -> int:
    """Parameters of one hybrid layer with its norm."""
    mixers = {
        MAMBA1: _mamba1_parameters,
        MAMBA2: _mamba2_parameters,
        GATED_DELTA_NET: _gated_delta_net_parameters,
        WINDOW_ATTENTION: _self_attention_parameters,
        FULL_ATTENTION: _self_attention_parameters,
        CROSS_ATTENTION: _cross_attention_parameters,
        GMU: _gmu_parameters,
        MLP: lambda arch: _mlp_parameters(arch, arch.ffn_hidden_size),
        MOE: _moe_parameters,
    }
    return mixers[symbol](arch) + norm_parameters(arch)


def norm_parameters(arch: Architecture) -> int:
    """Parameters of one norm of the residual stream: weight, and LayerNorm's bias."""
    return arch.hidden_size * (2 if arch.normalization == "LayerNorm" else 1)


def embedding_parameters(arch: Architecture) -> int:
    """Parameters of the embedding and, when it is not tied, of the output layer."""
    return arch.vocab_size * arch.hidden_size * (1 if arch.tied_embeddings else 2)


def non_embedding_parameters(arch: Architecture) -> int:
    """Parameters of all layers and of the final norm."""
    return sum(layer_parameters(arch, symbol) for symbol in arch.pattern) + norm_parameters(arch)


def parameters(arch: Architecture) -> int:
    """All parameters."""
    return non_embedding_parameters(arch) + embedding_parameters(arch)


def _mamba1_parameters(arch: Architecture) -> int:
    w, d, r, n = arch.hidden_size, arch.d_inner, arch.dt_rank, arch.state_size
    projections = w * 2 * d + d * (r + 2 * n) + (r + 1) * d + d * w
    return projections + d * (arch.conv_kernel + 1) + d * n + d  # conv, A_log, D


def _mamba2_parameters(arch: Architecture) -> int:
    w, d, n, heads = arch.hidden_size, arch.mamba2_d_inner, arch.mamba2_state_size, arch.mamba2_heads
    projections = w * (2 * d + 2 * n + heads) + d * w
    return projections + (d + 2 * n) * (arch.conv_kernel + 1) + 3 * heads + d  # conv; A_log, D, dt_bias; norm


def _gated_delta_net_parameters(arch: Architecture) -> int:
    w, k, heads = arch.hidden_size, arch.gdn_key_size, arch.gdn_heads
    projections = w * (2 * k + 2 * 2 * k + 2 * heads) + 2 * k * w
    return projections + 4 * k * arch.conv_kernel + 2 * heads + 2 * k  # conv; A_log, dt_bias; norm


def _self_attention_parameters(arch: Architecture) -> int:
    keys_and_values = 2 * arch.kv_size * (arch.hidden_size + arch.qkv_bias)
    return _cross_attention_parameters(arch) + keys_and_values + 2 * arch.head_dim * arch.qk_norm


def _cross_attention_parameters(arch: Architecture) -> int:
    w, q, heads = arch.hidden_size, arch.query_size, arch.num_attention_heads
    projections = q * (w + arch.qkv_bias) + (q + arch.attention_output_bias) * w
    differential = 6 * arch.head_dim * arch.differential_attention  # four lambdas, the norm of a pair of heads
    return projections + differential + heads * (w + arch.qkv_bias) * arch.attention_gate + heads * arch.attention_sink


def _gmu_parameters(arch: Architecture) -> int:
    w, d = arch.hidden_size, arch.memory_size
    return 2 * w * d + (w + d) * arch.linear_bias + d * arch.normalizes_memory


def _mlp_parameters(arch: Architecture, ffn_hidden_size: int) -> int:
    return 3 * arch.hidden_size * ffn_hidden_size + (2 * ffn_hidden_size + arch.hidden_size) * arch.linear_bias


def _moe_parameters(arch: Architecture) -> int:
    experts = arch.num_experts + arch.shared_expert
    return arch.hidden_size * arch.num_experts + experts * _mlp_parameters(arch, arch.expert_ffn_size)


def layer_flops(arch: Architecture, symbol: str, sequence_length: int) -> float:
    """Forward FLOPs per token of one hybrid layer, averaged over a sequence."""
    return 2 * matrix_elements(arch, symbol) + mixing_flops(arch, symbol, sequence_length)


def matrix_elements(arch: Architecture, symbol: str) -> int:
    """Elements of the matrices that a token is multiplied with in one hybrid layer."""
    w, q, kv, d, f = arch.hidden_size, arch.query_size, arch.kv_size, arch.d_inner, arch.ffn_hidden_size
    gate = w * arch.num_attention_heads * arch.attention_gate
    matrices = {
        MAMBA1: w * 2 * d + d * (2 * arch.dt_rank + 2 * arch.state_size) + d * w,
        MAMBA2: w * (3 * arch.mamba2_d_inner + 2 * arch.mamba2_state_size + arch.mamba2_heads),
        GATED_DELTA_NET: w * (8 * arch.gdn_key_size + 2 * arch.gdn_heads),
        WINDOW_ATTENTION: w * (2 * q + 2 * kv) + gate,
        FULL_ATTENTION: w * (2 * q + 2 * kv) + gate,
        CROSS_ATTENTION: 2 * w * q + gate,
        GMU: 2 * w * arch.memory_size,
        MLP: 3 * w * f,
        MOE: w * arch.num_experts + 3 * w * f,  # the experts of a token are together as large as an MLP
    }
    return matrices[symbol]


def mixing_flops(arch: Architecture, symbol: str, sequence_length: int) -> float:
    """Forward FLOPs per token of what mixes tokens: attention scores, scans, convolutions."""
    if symbol in (WINDOW_ATTENTION, FULL_ATTENTION, CROSS_ATTENTION):
        window = arch.window if symbol == WINDOW_ATTENTION else arch.full_window
        # q.k and the weighted sum of v; a pair of differential maps weighs the values of both its heads.
        per_token = (6 if arch.differential_attention else 4) * arch.query_size
        return per_token * _mean_context(sequence_length, window or sequence_length)
    conv = 2 * arch.conv_kernel
    if symbol == MAMBA1:  # three products to discretise and update the state, one multiply-add to read it
        return arch.d_inner * (6 * arch.state_size + conv)
    if symbol == MAMBA2:
        d, n = arch.mamba2_d_inner, arch.mamba2_state_size
        return 6 * d * n + conv * (d + 2 * n)
    if symbol == GATED_DELTA_NET:  # decay, what the key reads, the rank-one update, what the query reads
        return 2 * arch.gdn_key_size * (7 * arch.gdn_head_dim + 2 * conv)
    return 0


def output_flops(arch: Architecture) -> float:
    """Forward FLOPs per token of the output layer."""
    return 2 * arch.hidden_size * arch.vocab_size


def training_flops(arch: Architecture, sequence_length: int) -> float:
    """FLOPs per trained token: forward, and twice that for the backward pass."""
    layers = sum(layer_flops(arch, symbol, sequence_length) for symbol in arch.pattern)
    return 3 * (layers + output_flops(arch))


def _mean_context(sequence_length: int, window: int) -> float:
    """Mean number of tokens that a causal query sees: position t sees min(t + 1, window)."""
    window = min(window, sequence_length)
    return window - window * (window - 1) / (2 * sequence_length)
