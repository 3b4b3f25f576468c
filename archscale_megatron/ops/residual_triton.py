"""The residual sum in Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048  # elements of a row in one program: 16 in a thread


def add(residual: Tensor, output: Tensor, bias: Tensor | None, multiplier: float, total: Tensor) -> None:
    """residual + multiplier * (output + bias) [rows, n] into total, of rows * n elements."""
    grid, block = _grid(residual)
    strides = (residual.stride(0), output.stride(0))
    _add_kernel[grid](residual, output, bias, total, residual.shape[1], *strides, multiplier, BLOCK=block)


def scale(x: Tensor, multiplier: float, y: Tensor) -> None:
    """multiplier * x [rows, n] into y, of rows * n elements."""
    grid, block = _grid(x)
    _scale_kernel[grid](x, y, x.shape[1], x.stride(0), multiplier, BLOCK=block)


def _grid(x: Tensor) -> tuple[tuple[int, int], int]:
    rows, width = x.shape
    block = min(BLOCK, triton.next_power_of_2(width))
    return (rows, triton.cdiv(width, block)), block


@triton.jit
def _add_kernel(residual, output, bias, total, width, residual_stride, output_stride, multiplier, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    x = tl.load(residual + row * residual_stride + column, mask=mask).to(tl.float32)
    y = tl.load(output + row * output_stride + column, mask=mask).to(tl.float32)
    if bias is not None:
        y += tl.load(bias + column, mask=mask).to(tl.float32)
    tl.store(total + row * width + column, (x + multiplier * y).to(total.dtype.element_ty), mask=mask)


@triton.jit
def _scale_kernel(x, y, width, x_stride, multiplier, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    v = tl.load(x + row * x_stride + column, mask=mask).to(tl.float32)
    tl.store(y + row * width + column, (multiplier * v).to(y.dtype.element_ty), mask=mask)
