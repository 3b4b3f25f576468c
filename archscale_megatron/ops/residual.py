"""The sum of the residual stream and a mixer's output: on a GPU in one pass each way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from archscale_megatron.ops import fused


def residual_add(residual: Tensor, output: Tensor, bias: Tensor | None, multiplier: float) -> Tensor:
    """residual + multiplier * (output + bias), in the dtype of residual.

    Args:
        residual: [..., n], fp32 or the dtype of output.
        output: [..., n].
        bias: [n] or None.
    """
    kernels = fused.kernels("residual", residual, output)
    if kernels is not None:
        return _ResidualAdd.apply(kernels, residual, output, bias, multiplier)
    scaled = (output if multiplier == 1 else output * multiplier).to(residual.dtype)
    if bias is not None:
        scaled = scaled + (bias if multiplier == 1 else bias * multiplier).to(residual.dtype)
    return residual + scaled


class _ResidualAdd(torch.autograd.Function):
    """Keeps nothing."""

    @staticmethod
    def forward(
        ctx: Any, kernels: Any, residual: Tensor, output: Tensor, bias: Tensor | None, multiplier: float
    ) -> Tensor:
        ctx.kernels, ctx.multiplier, ctx.dtype = kernels, multiplier, output.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        total = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
        kernels.add(fused.rows(residual), fused.rows(output), bias, multiplier, total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_output = torch.empty(grad.shape, dtype=ctx.dtype, device=grad.device)
        grad_rows = fused.rows(grad)
        ctx.kernels.scale(grad_rows, ctx.multiplier, grad_output)
        grad_bias = None
        if ctx.bias_dtype is not None:
            grad_bias = (grad_rows.sum(0, dtype=torch.float32) * ctx.multiplier).to(ctx.bias_dtype)
        return None, grad, grad_output, grad_bias, None
