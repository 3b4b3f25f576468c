"""What a gate lets through, element by element or head by head: on a GPU in one pass each way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from archscale_megatron.ops import fused


def silu_gate(gate: Tensor, x: Tensor) -> Tensor:
    """silu(gate) * x, in fp32.

    Args:
        gate, x: [..., n], of one shape; cut out of larger tensors, if need be.

    Returns:
        [..., n] in the dtype of gate.
    """
    kernels = fused.kernels("gate", gate, x)
    if kernels is not None:
        return _SiluGate.apply(kernels, gate, x)
    return (F.silu(gate.float()) * x).to(gate.dtype)


def head_gate(gate: Tensor, heads: Tensor) -> Tensor:
    """sigmoid(gate) * heads, in fp32.

    Args:
        gate: [..., heads].
        heads: [..., heads, d].

    Returns:
        [..., heads, d] in the dtype of heads.
    """
    kernels = fused.kernels("gate", gate, heads)
    if kernels is not None:
        return _HeadGate.apply(kernels, gate, heads)
    return (heads * torch.sigmoid(gate.float())[..., None]).to(heads.dtype)


class _SiluGate(torch.autograd.Function):
    """Keeps its inputs."""

    @staticmethod
    def forward(ctx: Any, kernels: Any, gate: Tensor, x: Tensor) -> Tensor:
        ctx.kernels = kernels
        ctx.save_for_backward(gate, x)
        y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        kernels.silu_gate(*(fused.rows(v) for v in (gate, x, y)))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor]:
        gate, x = ctx.saved_tensors
        grad_gate, grad_x = (torch.empty(v.shape, dtype=v.dtype, device=v.device) for v in (gate, x))
        ctx.kernels.silu_gate_backward(*(fused.rows(v) for v in (grad, gate, x, grad_gate, grad_x)))
        return None, grad_gate, grad_x


class _HeadGate(torch.autograd.Function):
    """Keeps its inputs."""

    @staticmethod
    def forward(ctx: Any, kernels: Any, gate: Tensor, heads: Tensor) -> Tensor:
        ctx.kernels = kernels
        ctx.save_for_backward(gate, heads)
        y = torch.empty(heads.shape, dtype=heads.dtype, device=heads.device)
        kernels.head_gate(gate.contiguous(), fused.rows(heads), y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor]:
        gate, heads = ctx.saved_tensors
        grad_gate, grad_heads = (torch.empty(v.shape, dtype=v.dtype, device=v.device) for v in (gate, heads))
        inputs = (fused.rows(grad), gate.contiguous(), fused.rows(heads))
        ctx.kernels.head_gate_backward(*inputs, grad_gate, grad_heads)
        return None, grad_gate, grad_heads
