"""Gates in Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048  # elements of a row in one program: 16 in a thread


def silu_gate(gate: Tensor, x: Tensor, y: Tensor) -> None:
    """silu(gate) * x into y, [rows, n] each."""
    grid, block = _grid(gate)
    strides = (v.stride(0) for v in (gate, x, y))
    _silu_kernel[grid](gate, x, y, gate.shape[1], *strides, BLOCK=block)


def silu_gate_backward(grad: Tensor, gate: Tensor, x: Tensor, grad_gate: Tensor, grad_x: Tensor) -> None:
    """From the gradient of y those of gate and x, [rows, n] each."""
    grid, block = _grid(gate)
    strides = (v.stride(0) for v in (grad, gate, x, grad_gate, grad_x))
    _silu_backward_kernel[grid](grad, gate, x, grad_gate, grad_x, gate.shape[1], *strides, BLOCK=block)


def head_gate(gate: Tensor, heads: Tensor, y: Tensor) -> None:
    """sigmoid(gate) * heads into y, of rows * d elements.

    Args:
        gate: contiguous, of rows elements.
        heads: [rows, d].
    """
    grid, blocks = _head_grid(heads)
    _head_kernel[grid](gate, heads, y, *heads.shape, heads.stride(0), **blocks)


def head_gate_backward(grad: Tensor, gate: Tensor, heads: Tensor, grad_gate: Tensor, grad_heads: Tensor) -> None:
    """From the gradient [rows, d] of y those of gate and heads, of as many elements."""
    grid, blocks = _head_grid(heads)
    strides = (grad.stride(0), heads.stride(0))
    _head_backward_kernel[grid](grad, gate, heads, grad_gate, grad_heads, *heads.shape, *strides, **blocks)


def _head_grid(heads: Tensor) -> tuple[tuple[int], dict[str, int]]:
    rows, width = heads.shape
    padded = triton.next_power_of_2(width)
    in_block = max(1, BLOCK // padded)
    return (triton.cdiv(rows, in_block),), {"ROWS": in_block, "WIDTH": padded}


def _grid(x: Tensor) -> tuple[tuple[int, int], int]:
    rows, width = x.shape
    block = min(BLOCK, triton.next_power_of_2(width))
    return (rows, triton.cdiv(width, block)), block


@triton.jit
def _silu_kernel(gate, x, y, width, gate_stride, x_stride, y_stride, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    g = tl.load(gate + row * gate_stride + column, mask=mask).to(tl.float32)
    v = tl.load(x + row * x_stride + column, mask=mask).to(tl.float32)
    tl.store(y + row * y_stride + column, (g * tl.sigmoid(g) * v).to(y.dtype.element_ty), mask=mask)


@triton.jit
def _silu_backward_kernel(
    grad, gate, x, grad_gate, grad_x,
    width, grad_stride, gate_stride, x_stride, grad_gate_stride, grad_x_stride, BLOCK: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    dy = tl.load(grad + row * grad_stride + column, mask=mask).to(tl.float32)
    g = tl.load(gate + row * gate_stride + column, mask=mask).to(tl.float32)
    v = tl.load(x + row * x_stride + column, mask=mask).to(tl.float32)
    sigmoid = tl.sigmoid(g)
    dg = dy * v * sigmoid * (1.0 + g * (1.0 - sigmoid))
    tl.store(grad_gate + row * grad_gate_stride + column, dg.to(grad_gate.dtype.element_ty), mask=mask)
    tl.store(grad_x + row * grad_x_stride + column, (dy * g * sigmoid).to(grad_x.dtype.element_ty), mask=mask)


@triton.jit
def _head_kernel(gate, heads, y, rows, width, heads_stride, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    mask = (row < rows)[:, None] & (column < width)[None, :]
    sigmoid = tl.sigmoid(tl.load(gate + row, mask=row < rows, other=0.0).to(tl.float32))
    v = tl.load(heads + row[:, None] * heads_stride + column[None, :], mask=mask).to(tl.float32)
    offset = row[:, None] * width + column[None, :]
    tl.store(y + offset, (sigmoid[:, None] * v).to(y.dtype.element_ty), mask=mask)


@triton.jit
def _head_backward_kernel(
    grad, gate, heads, grad_gate, grad_heads, rows, width, grad_stride, heads_stride,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    mask = (row < rows)[:, None] & (column < width)[None, :]
    sigmoid = tl.sigmoid(tl.load(gate + row, mask=row < rows, other=0.0).to(tl.float32))
    v = tl.load(heads + row[:, None] * heads_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(grad + row[:, None] * grad_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    dg = tl.sum(dy * v, 1) * sigmoid * (1.0 - sigmoid)
    tl.store(grad_gate + row, dg.to(grad_gate.dtype.element_ty), mask=row < rows)
    offset = row[:, None] * width + column[None, :]
    tl.store(grad_heads + offset, (sigmoid[:, None] * dy).to(grad_heads.dtype.element_ty), mask=mask)
