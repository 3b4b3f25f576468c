"""RMSNorm and LayerNorm of a residual stream, and RMSNorm behind a gate: on a GPU in one pass each way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from archscale_megatron.ops import fused

PROGRAMS = 528  # four for each processor of an H100 share the rows of a backward pass and the weights' gradient


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """x / sqrt(mean(x^2) + eps) * weight without a bias, (x - mean(x)) / sqrt(var(x) + eps) * weight + bias with one.

    Args:
        x: [..., n] in any float dtype, in which the maths is done, and at least in fp32 on a GPU.
        weight, bias: [n].

    Returns:
        The normed x in the dtype of weight, and x itself. Whoever adds to x should take the latter: on a GPU the
        gradients of both are then summed where the norm's is computed, without another pass over memory.
    """
    kernels = fused.kernels("norm", x, weight)
    if kernels is not None:
        return _Norm.apply(kernels, x, None, weight, bias, eps)
    if bias is None:
        normed = F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)
    else:
        normed = F.layer_norm(x, weight.shape, weight.to(x.dtype), bias.to(x.dtype), eps)
    return normed.to(weight.dtype), x


def gated_rms_norm(
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    eps: float,
    ranks: int = 1,
    sum_over_ranks: Callable[[Tensor], Tensor] = lambda squares: squares,
) -> Tensor:
    """v / sqrt(mean(v^2) + eps) * weight with v = x * silu(gate), in fp32.

    Args:
        x, gate: [..., n], this rank's channels.
        weight: [n].
        ranks: how many have n channels each; the mean is over all. The kernel is for one.
        sum_over_ranks: sums a [..., 1] over them, and its gradient.

    Returns:
        [..., n] in the dtype of weight.
    """
    kernels = fused.kernels("norm", x, gate, weight) if ranks == 1 else None
    if kernels is not None:
        return _Norm.apply(kernels, x, gate, weight, None, eps)[0]
    gated = x.float() * F.silu(gate.float())
    squares = sum_over_ranks(gated.square().sum(-1, keepdim=True))
    return (gated * torch.rsqrt(squares / (ranks * len(weight)) + eps) * weight.float()).to(weight.dtype)


class _Norm(torch.autograd.Function):
    """Keeps its inputs and a fp32 number a row."""

    @staticmethod
    def forward(
        ctx: Any, kernels: Any, x: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        flat = fused.rows(x)
        y = torch.empty(x.shape, dtype=weight.dtype, device=x.device)
        scales = torch.empty(len(flat), dtype=torch.float32, device=x.device)
        flat_gate = None if gate is None else fused.rows(gate)
        kernels.forward(flat, flat_gate, weight, bias, eps, y, scales)
        ctx.save_for_backward(x, gate, weight, bias, scales)
        ctx.kernels = kernels
        ctx.set_materialize_grads(False)
        return y, x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_residual: Tensor | None) -> tuple[Tensor | None, ...]:
        x, gate, weight, bias, scales = ctx.saved_tensors
        if grad is None:
            return None, grad_residual, None, None, None, None
        inputs = [None if v is None else fused.rows(v) for v in (grad, grad_residual, x, gate)]
        grad_x, grad_gate = (
            None if v is None else torch.empty(v.shape, dtype=v.dtype, device=v.device) for v in (x, gate)
        )
        parts = [None if v is None else scales.new_empty(PROGRAMS, len(weight)) for v in (weight, bias)]
        ctx.kernels.backward(*inputs, weight, scales, grad_x, grad_gate, *parts)
        grad_weight, grad_bias = (None if p is None else p.sum(0).to(weight.dtype) for p in parts)
        return None, grad_x, grad_gate, grad_weight, grad_bias, None
