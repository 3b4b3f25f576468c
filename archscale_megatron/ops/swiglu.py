"""The gated activation of a SwiGLU MLP, with as few passes over memory as torch allows without a compiler."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from archscale_megatron.ops import fused


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up (arXiv 2002.05202): on a GPU in one pass each way and fp32, elsewhere bit for bit what autograd
    makes of it, gradient included.

    Only the input is kept for the backward pass, which writes both halves of the gradient in place.

    Args:
        gate_up: [..., 2 f]; the gate, then the up branch.

    Returns:
        [..., f] in the dtype of gate_up.
    """
    return _SwiGLU.apply(gate_up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.kernels = fused.kernels("gate", gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        if ctx.kernels is None:
            return F.silu(gate).mul_(up)
        y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        ctx.kernels.silu_gate(*(fused.rows(v) for v in (gate, up, y)))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
        if ctx.kernels is not None:
            ctx.kernels.silu_gate_backward(*(fused.rows(v) for v in (grad, gate, up, grad_gate, grad_up)))
            return grad_gate_up
        torch.ops.aten.silu.out(gate, out=grad_up).mul_(grad)
        torch.mul(grad, up, out=grad_gate)
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        return grad_gate_up
