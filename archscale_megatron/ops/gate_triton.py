"""Gates in Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048  # elements of a row in one program: 16 in a thread


def silu_gate(gate: Tensor, x: Tensor, y: Tensor) -> None:
    """silu(gate) * x [rows, n] into y, of rows * n elements."""
    grid, block = _grid(gate)
    _silu_kernel[grid](gate, x, y, gate.shape[1], gate.stride(0), x.stride(0), BLOCK=block)


def silu_gate_backward(grad: Tensor, gate: Tensor, x: Tensor, grad_gate: Tensor, grad_x: Tensor) -> None:
    """From the gradient [rows, n] of y those of gate and x, of rows * n elements each."""
    grid, block = _grid(gate)
    strides = (grad.stride(0), gate.stride(0), x.stride(0))
    _silu_backward_kernel[grid](grad, gate, x, grad_gate, grad_x, gate.shape[1], *strides, BLOCK=block)


def _grid(x: Tensor) -> tuple[tuple[int, int], int]:
    rows, width = x.shape
    block = min(BLOCK, triton.next_power_of_2(width))
    return (rows, triton.cdiv(width, block)), block


@triton.jit
def _silu_kernel(gate, x, y, width, gate_stride, x_stride, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    g = tl.load(gate + row * gate_stride + column, mask=mask).to(tl.float32)
    v = tl.load(x + row * x_stride + column, mask=mask).to(tl.float32)
    tl.store(y + row * width + column, (g * tl.sigmoid(g) * v).to(y.dtype.element_ty), mask=mask)


@triton.jit
def _silu_backward_kernel(
    grad, gate, x, grad_gate, grad_x, width, grad_stride, gate_stride, x_stride, BLOCK: tl.constexpr
):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    dy = tl.load(grad + row * grad_stride + column, mask=mask).to(tl.float32)
    g = tl.load(gate + row * gate_stride + column, mask=mask).to(tl.float32)
    v = tl.load(x + row * x_stride + column, mask=mask).to(tl.float32)
    sigmoid = tl.sigmoid(g)
    dg = dy * v * sigmoid * (1.0 + g * (1.0 - sigmoid))
    offset = row * width + column
    tl.store(grad_gate + offset, dg.to(grad_gate.dtype.element_ty), mask=mask)
    tl.store(grad_x + offset, (dy * g * sigmoid).to(grad_x.dtype.element_ty), mask=mask)
