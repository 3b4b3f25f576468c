"""Rotary position embedding (arXiv 2104.09864): on a GPU in one pass each way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from archscale_megatron.ops import fused


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of channels (i, i + d / 2) by the angle of its token.

    Args:
        x: [s, b, heads, d].
        cos, sin: fp32 [s, 1, 1, d] of the angles, whose two halves are alike.

    Returns:
        [s, b, heads, d] in the dtype of x. On a GPU the maths is in fp32, elsewhere in the dtype of x.
    """
    return _Rotate.apply(fused.kernels("rotary", x, cos), x, cos, sin)


class _Rotate(torch.autograd.Function):
    """Keeps cos and sin, which all layers share."""

    @staticmethod
    def forward(ctx: Any, kernels: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.kernels = kernels
        ctx.save_for_backward(cos, sin)
        return _turned(kernels, x, cos, sin, backward=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return None, _turned(ctx.kernels, grad, cos, sin, backward=True), None, None


def _turned(kernels: Any | None, x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    if kernels is None:
        first, second = x.chunk(2, dim=-1)
        other = torch.cat((second, -first) if backward else (-second, first), dim=-1)
        return (x * cos.to(x.dtype) + other * sin.to(x.dtype)).contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    kernels.rotate(x if x.stride(-1) == 1 else x.contiguous(), cos, sin, y, backward)
    return y
