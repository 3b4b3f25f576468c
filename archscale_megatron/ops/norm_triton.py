"""Norms in Triton: a program has whole rows, in registers from the one read to the one write.

Nothing is added atomically: each program of the backward pass sums the weights' gradient over its rows, and torch the
programs' sums, so that results repeat exactly.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

TILE = 2048  # elements of a tile, as many rows as fit, but at least one; 8 warps have 8 in a thread


def forward(
    x: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, y: Tensor, scales: Tensor
) -> None:
    """Norm x, or x silu(gate), into y and 1 / sqrt(variance + eps) into scales.

    Args:
        x, gate: [rows, n], the elements of a row side by side.
        weight, bias: [n].
        y: rows * n elements.
        scales: fp32 [rows].
    """
    rows, width = x.shape
    blocks = _blocks(width)
    grid = (triton.cdiv(rows, blocks["ROWS"]),)
    gate_stride = 0 if gate is None else gate.stride(0)
    _norm_forward_kernel[grid](x, gate, weight, bias, y, scales, rows, width, x.stride(0), gate_stride, eps, **blocks)


def backward(
    grad: Tensor,
    grad_residual: Tensor | None,
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    scales: Tensor,
    grad_x: Tensor,
    grad_gate: Tensor | None,
    grad_weight: Tensor,
    grad_bias: Tensor | None,
) -> None:
    """The gradients of what `forward` computes, that of x with grad_residual added.

    Args:
        grad, grad_residual: [rows, n], of y and, besides, of x.
        grad_x, grad_gate: rows * n elements.
        grad_weight, grad_bias: fp32 [programs, n], to be summed over the programs; with a bias, x is centred.
    """
    rows, width = x.shape
    strides = [0 if v is None else v.stride(0) for v in (grad, grad_residual, x, gate)]
    outputs = (grad_x, grad_gate, grad_weight, grad_bias)
    inputs = (grad, grad_residual, x, gate, weight, scales)
    _norm_backward_kernel[(len(grad_weight),)](*inputs, *outputs, rows, width, *strides, **_blocks(width))


def _blocks(width: int) -> dict[str, int]:
    padded = triton.next_power_of_2(width)
    return {"ROWS": max(1, TILE // padded), "WIDTH": padded, "num_warps": min(16, max(8, padded // 256))}


@triton.jit
def _load(ptr, row, column, stride, mask):
    """Rows of a tensor in fp32, 0 outside of it."""
    return tl.load(ptr + row.to(tl.int64)[:, None] * stride + column[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _centred(x, mask, width):
    return tl.where(mask, x - tl.sum(x, 1)[:, None] / width, 0.0)


@triton.jit
def _norm_forward_kernel(
    x, gate, weight, bias, y, scales, rows, width, x_stride, gate_stride, eps,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    mask = (row < rows)[:, None] & (column < width)[None, :]
    values = _load(x, row, column, x_stride, mask)
    if gate is not None:
        g = _load(gate, row, column, gate_stride, mask)
        values *= g * tl.sigmoid(g)
    if bias is not None:
        values = _centred(values, mask, width)
    scale = tl.rsqrt(tl.sum(values * values, 1) / width + eps)
    tl.store(scales + row, scale, mask=row < rows)
    w = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    result = values * scale[:, None] * w[None, :]
    if bias is not None:
        result += tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    offset = row.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(y + offset, result.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _norm_backward_kernel(
    grad, grad_residual, x, gate, weight, scales, grad_x, grad_gate, grad_weight, grad_bias,
    rows, width, grad_stride, residual_stride, x_stride, gate_stride,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, WIDTH)
    w = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    weight_sum = tl.zeros((ROWS, WIDTH), tl.float32)
    bias_sum = tl.zeros((ROWS, WIDTH), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (column < width)[None, :]
        offset = row.to(tl.int64)[:, None] * width + column[None, :]
        scale = tl.load(scales + row, mask=row < rows, other=0.0)
        source = _load(x, row, column, x_stride, mask)
        dy = _load(grad, row, column, grad_stride, mask)
        values = source
        if gate is not None:
            g = _load(gate, row, column, gate_stride, mask)
            sigmoid = tl.sigmoid(g)
            values = source * g * sigmoid
        if grad_bias is not None:
            values = _centred(values, mask, width)
            bias_sum += dy
        normed = values * scale[:, None]
        weight_sum += dy * normed
        dy *= w[None, :]
        dx = dy - normed * (tl.sum(dy * normed, 1) / width)[:, None]
        if grad_bias is not None:
            dx -= (tl.sum(dy, 1) / width)[:, None]
        dx *= scale[:, None]
        if gate is not None:
            dg = dx * source * sigmoid * (1.0 + g * (1.0 - sigmoid))
            tl.store(grad_gate + offset, dg.to(grad_gate.dtype.element_ty), mask=mask)
            dx *= g * sigmoid
        if grad_residual is not None:
            dx += _load(grad_residual, row, column, residual_stride, mask)
        tl.store(grad_x + offset, dx.to(grad_x.dtype.element_ty), mask=mask)
    part = tl.program_id(0) * width + column
    tl.store(grad_weight + part, tl.sum(weight_sum, 0), mask=column < width)
    if grad_bias is not None:
        tl.store(grad_bias + part, tl.sum(bias_sum, 0), mask=column < width)
