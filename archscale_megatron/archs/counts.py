"""How many parameters an architecture has, and how many floating-point operations a token costs.

The parameter counts are exact. FLOPs count two per multiply-add, of the matrix products, the attention
scores inside the causal window, and the scan's recurrence; norms, activations and the optimizer are left out.
"""

from __future__ import annotations

from archscale_megatron.archs.architecture import (
    CROSS_ATTENTION,
    FULL_ATTENTION,
    GMU,
    MAMBA1,
    MLP,
    WINDOW_ATTENTION,
    Architecture,
)


def layer_parameters(arch: Architecture, symbol: str) -> int:
    """Parameters of one hybrid layer with its norm."""
    w, q, kv, d, r, n = (
        arch.hidden_size, arch.query_size, arch.kv_size, arch.d_inner, arch.dt_rank, arch.state_size
    )  # fmt: skip
    mixer = {
        MAMBA1: w * 2 * d + d * (arch.conv_kernel + 1) + d * (r + 2 * n) + (r + 1) * d + d * n + d + d * w,
        WINDOW_ATTENTION: w * (q + 2 * kv) + q * w,
        FULL_ATTENTION: w * (q + 2 * kv) + q * w,
        GMU: w * d + d * w,
        CROSS_ATTENTION: w * q + q * w,
        MLP: 3 * w * arch.ffn_hidden_size,
    }
    return mixer[symbol] + w


def embedding_parameters(arch: Architecture) -> int:
    """Parameters of the embedding and, when it is not tied, of the output layer."""
    return arch.vocab_size * arch.hidden_size * (1 if arch.tied_embeddings else 2)


def non_embedding_parameters(arch: Architecture) -> int:
    """Parameters of all layers and of the final norm."""
    return sum(layer_parameters(arch, symbol) for symbol in arch.pattern) + arch.hidden_size


def parameters(arch: Architecture) -> int:
    """All parameters."""
    return non_embedding_parameters(arch) + embedding_parameters(arch)


def layer_flops(arch: Architecture, symbol: str, sequence_length: int) -> float:
    """Forward FLOPs per token of one hybrid layer, averaged over a sequence."""
    w, q, kv, d, r, n = (
        arch.hidden_size, arch.query_size, arch.kv_size, arch.d_inner, arch.dt_rank, arch.state_size
    )  # fmt: skip
    window = arch.window if symbol == WINDOW_ATTENTION else sequence_length
    scores = 4 * q * _mean_context(sequence_length, window)  # q.k, and the weighted sum of v
    # The recurrence: three products to discretise and update the state, one multiply-add to read it.
    scan = 6 * d * n + 2 * d * arch.conv_kernel
    flops = {
        MAMBA1: 2 * (w * 2 * d + d * (r + 2 * n) + r * d + d * w) + scan,
        WINDOW_ATTENTION: 2 * (w * (q + 2 * kv) + q * w) + scores,
        FULL_ATTENTION: 2 * (w * (q + 2 * kv) + q * w) + scores,
        GMU: 2 * (w * d + d * w),
        CROSS_ATTENTION: 2 * (w * q + q * w) + scores,
        MLP: 2 * 3 * w * arch.ffn_hidden_size,
    }
    return flops[symbol]


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
