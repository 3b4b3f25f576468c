"""What a sequence costs in memory at inference: bytes that grow with its length, and bytes that do not.

Keys and values are cached in bf16, and so are the last inputs of the causal convolutions; the states of the scans
are fp32. GMUs and cross attention hold nothing: they read what another layer of the same step wrote.
"""

from __future__ import annotations

from archscale_megatron.archs.architecture import (
    FULL_ATTENTION,
    GATED_DELTA_NET,
    MAMBA1,
    MAMBA2,
    WINDOW_ATTENTION,
    Architecture,
)

BF16, FP32 = 2, 4


def cache_bytes_per_token(arch: Architecture) -> int:
    """Bytes that every further token adds: keys and values of the layers that attend to all of them."""
    growing = 0 if arch.full_window else arch.pattern.count(FULL_ATTENTION)
    return growing * _key_value_bytes(arch)


def state_bytes(arch: Architecture) -> int:
    """Bytes of a sequence that do not depend on its length: scans, convolutions, the last tokens of windows."""
    return sum(_layer_state_bytes(arch, symbol) for symbol in arch.pattern)


def _key_value_bytes(arch: Architecture) -> int:
    """Of one token in one layer. Differential attention has the same keys and values."""
    return 2 * arch.kv_size * BF16


def _layer_state_bytes(arch: Architecture, symbol: str) -> int:
    if symbol == WINDOW_ATTENTION:
        return arch.window * _key_value_bytes(arch)
    if symbol == FULL_ATTENTION:
        return (arch.full_window or 0) * _key_value_bytes(arch)
    taps = arch.conv_kernel - 1  # inputs before the current one that a convolution sees
    if symbol == MAMBA1:
        return arch.d_inner * (taps * BF16 + arch.state_size * FP32)
    if symbol == MAMBA2:  # the convolution also has B and C
        d, n = arch.mamba2_d_inner, arch.mamba2_state_size
        return (d + 2 * n) * taps * BF16 + d * n * FP32
    if symbol == GATED_DELTA_NET:  # convolutions of queries, keys and values; a head's state is key x value size
        return 4 * arch.gdn_key_size * taps * BF16 + arch.gdn_key_size * 2 * arch.gdn_head_dim * FP32
    return 0
