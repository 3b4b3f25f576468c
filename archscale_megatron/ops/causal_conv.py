"""Causal depthwise convolution over time: the short one in front of a Mamba or gated delta net scan."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from archscale_megatron.ops.documents import check_document_starts, document_ids, document_ids_by_row
from archscale_megatron.ops.packages import aligned, optional


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    document_starts: Tensor | None = None,
    activation: str | None = "silu",
) -> Tensor:
    """y_t = activation(sum_j weight[:, 0, k - 1 - j] x_{t-j} + bias), j from 0 to k - 1.

    What precedes the sequence or the token's document is zero. Sums are fp32 (float64 if x is). The package
    causal-conv1d computes it on a GPU where it is installed and made for such a convolution, our Triton kernel where it
    is not, torch elsewhere.

    Args:
        x: [s, b, d].
        weight: [d, 1, k], the layout of torch's depthwise Conv1d.
        bias: [d] or None.
        document_starts: bool [s, b], True at a document's first token.
        activation: "silu" or None.

    Returns:
        [s, b, d] in the dtype of x.

    Raises:
        ValueError: shapes that do not fit, an unknown activation, or document_starts that is not bool [s, b].
    """
    _check_arguments(x, weight, bias, document_starts, activation)
    return _kernel(x, weight)(x, weight, bias, document_starts, activation)


def _kernel(x: Tensor, weight: Tensor) -> Callable[..., Tensor]:
    if x.is_cuda and x.dtype != torch.float64:
        served = 2 <= weight.shape[-1] <= 4 and x.shape[-1] % 8 == 0
        # Its sums over tokens, the weights' gradients, are atomic.
        if served and not torch.are_deterministic_algorithms_enabled() and optional("causal_conv1d"):
            return _package
        if optional("triton"):
            return _triton
    return _torch


def _check_arguments(
    x: Tensor, weight: Tensor, bias: Tensor | None, document_starts: Tensor | None, activation: str | None
) -> None:
    d = x.shape[-1]
    if x.dim() != 3 or weight.dim() != 3 or weight.shape[:2] != (d, 1) or (bias is not None and bias.shape != (d,)):
        raise ValueError(
            f"x {list(x.shape)}, weight {list(weight.shape)}, "
            f"bias {None if bias is None else list(bias.shape)}: "
            "give x [s, b, d], weight [d, 1, k], bias [d] or None"
        )
    if activation not in ("silu", None):
        raise ValueError(f"activation {activation!r}: give 'silu' or None")
    if document_starts is not None:
        check_document_starts(document_starts, *x.shape[:2])


def _package(
    x: Tensor, weight: Tensor, bias: Tensor | None, document_starts: Tensor | None, activation: str | None
) -> Tensor:
    from causal_conv1d import causal_conv1d_fn

    seq_idx = None if document_starts is None else document_ids_by_row(document_starts)
    # The kernel takes [b, d, s], and document ids only where d is the dense dimension, as it is here.
    y = causal_conv1d_fn(aligned(x).permute(1, 2, 0), weight.squeeze(1), bias, seq_idx=seq_idx, activation=activation)
    return y.permute(2, 0, 1)


def _triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, document_starts: Tensor | None, activation: str | None
) -> Tensor:
    from archscale_megatron.ops.causal_conv_triton import causal_conv1d_triton

    return causal_conv1d_triton(x, weight, bias, document_starts, activation)


def _torch(
    x: Tensor, weight: Tensor, bias: Tensor | None, document_starts: Tensor | None, activation: str | None
) -> Tensor:
    """One multiply-add per tap on shifted views: faster on a CPU than conv1d, which wants time last."""
    s, k = x.shape[0], weight.shape[-1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    padded = F.pad(x.to(dtype), (0, 0, 0, 0, k - 1, 0))
    taps = weight.squeeze(1).t().to(dtype)
    ids = None if document_starts is None else document_ids(document_starts)

    y = padded[k - 1 :] * taps[k - 1]
    if bias is not None:
        y = y + bias.to(dtype)
    for shift in range(1, k):
        shifted = padded[k - 1 - shift : k - 1 - shift + s]
        if ids is not None:
            other_document = F.pad(ids, (0, 0, shift, 0))[:s] != ids
            shifted = shifted.masked_fill(other_document.unsqueeze(-1), 0)
        y = torch.addcmul(y, shifted, taps[k - 1 - shift])
    return (F.silu(y) if activation == "silu" else y).to(x.dtype)
