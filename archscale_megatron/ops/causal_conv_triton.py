"""Causal depthwise convolution in Triton, forward and backward, for any GPU: x is read once and y written once.

A program takes BLOCK channels of one row of the batch, and STEPS time steps of it, TILE at a time. Every tap loads its
own shifted tile; all but the first find it in a cache. The backward pass computes the sums before the activation again.
Nothing is added atomically: torch adds up the partial sums over time and batch, so results repeat exactly.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK, TILE, STEPS = 128, 16, 128


def causal_conv1d_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, document_starts: Tensor | None, activation: str | None
) -> Tensor:
    """As `causal_conv.causal_conv1d`, for fp32, bf16 and fp16 and any number of taps; rows of x may be strided."""
    starts = None if document_starts is None else document_starts.contiguous().view(torch.int8)
    return _CausalConv.apply(x, weight, bias, starts, activation)


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, starts, activation):
        ctx.save_for_backward(x, weight, bias, starts)
        ctx.options = {
            "TAPS": weight.shape[-1],
            "SILU": activation == "silu",
            "BLOCK": BLOCK,
            "TILE": TILE,
            "STEPS": STEPS,
        }
        x = _dense_rows(x)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        inputs = x, weight.contiguous(), bias, starts
        _forward_kernel[_grid(x)](*inputs, y, *x.shape, *x.stride()[:2], **ctx.options)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, bias, starts = ctx.saved_tensors
        dy, x = _dense_rows(dy), _dense_rows(x)
        grid, taps = _grid(x), weight.shape[-1]
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        # Of each program: a row for each tap, and one for the bias.
        grads = torch.empty(grid[1] * grid[2], taps + 1, x.shape[-1], dtype=torch.float32, device=x.device)
        inputs = x, weight.contiguous(), bias, starts, dy
        strides = *x.stride()[:2], *dy.stride()[:2]
        rows = triton.next_power_of_2(taps + 1)
        _backward_kernel[grid](*inputs, grad_x, grads, *x.shape, *strides, ROWS=rows, **ctx.options)
        total = grads.sum(0)
        grad_weight = total[:taps].t().unsqueeze(1).to(weight.dtype)
        grad_bias = None if bias is None else total[taps].to(bias.dtype)
        return grad_x, grad_weight, grad_bias, None, None


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _grid(x: Tensor) -> tuple[int, int, int]:
    length, batch, d = x.shape
    return triton.cdiv(d, BLOCK), triton.cdiv(length, STEPS), batch


# Names in the kernels end in the tile's shape: T time steps, D channels, R rows of gradients. Steps t are 64-bit
# integers, as tensors may pass 2^31 elements. `step` and `row` are the strides of time and batch of a [s, b, d] tensor
# whose d is dense; `i` is the row of the batch.


@triton.jit
def _tile(ptr, t_T, in_T, i, step, row, channel_D, in_D):
    """Time steps t of a [s, b, d] tensor in fp32, 0 where not `in_T`."""
    mask = in_T[:, None] & in_D[None, :]
    return tl.load(ptr + (t_T * step + i * row)[:, None] + channel_D[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _weight(weight, shift: tl.constexpr, channel_D, in_D, TAPS: tl.constexpr):
    """The factor of the input `shift` steps ago."""
    return tl.load(weight + channel_D * TAPS + (TAPS - 1 - shift), mask=in_D, other=0.0).to(tl.float32)


@triton.jit
def _goes_on(starts, t_T, in_T, i, batch):
    """`in_T` without the steps t with which a document starts."""
    if starts is not None:
        in_T = in_T & (tl.load(starts + t_T * batch + i, mask=in_T, other=0) == 0)
    return in_T


@triton.jit
def _sums(x, weight, bias, starts, t_T, in_T, i, batch, step, row, channel_D, in_D, TAPS: tl.constexpr):
    """What the activation is applied to, at the steps t that are `in_T`."""
    zeros_D = tl.zeros(channel_D.shape, tl.float32)
    bias_D = zeros_D if bias is None else tl.load(bias + channel_D, mask=in_D, other=0.0).to(tl.float32)
    sums_TD = in_T[:, None].to(tl.float32) * bias_D[None, :]
    for shift in tl.static_range(TAPS):
        if shift > 0:
            in_T = _goes_on(starts, t_T - (shift - 1), in_T & (t_T >= shift), i, batch)
        x_TD = _tile(x, t_T - shift, in_T, i, step, row, channel_D, in_D)
        sums_TD += x_TD * _weight(weight, shift, channel_D, in_D, TAPS)[None, :]
    return sums_TD


@triton.jit
def _forward_kernel(
    x, weight, bias, starts, y, length, batch, d, step, row,
    TAPS: tl.constexpr, SILU: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    channel_D = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    i = tl.program_id(2).to(tl.int64)
    in_D = channel_D < d
    for tile in range(STEPS // TILE):
        t_T = tl.program_id(1).to(tl.int64) * STEPS + tile * TILE + tl.arange(0, TILE)
        in_T = t_T < length
        y_TD = _sums(x, weight, bias, starts, t_T, in_T, i, batch, step, row, channel_D, in_D, TAPS)
        if SILU:
            y_TD *= tl.sigmoid(y_TD)
        offset_TD = ((t_T * batch + i) * d)[:, None] + channel_D[None, :]
        tl.store(y + offset_TD, y_TD.to(y.dtype.element_ty), mask=in_T[:, None] & in_D[None, :])


@triton.jit
def _backward_kernel(
    x, weight, bias, starts, dy, grad_x, grads, length, batch, d, step, row, dy_step, dy_row,
    TAPS: tl.constexpr, SILU: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, STEPS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    channel_D = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    i = tl.program_id(2).to(tl.int64)
    in_D = channel_D < d
    row_R = tl.arange(0, ROWS)
    grads_RD = tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in range(STEPS // TILE):
        t_T = tl.program_id(1).to(tl.int64) * STEPS + tile * TILE + tl.arange(0, TILE)
        in_T = t_T < length

        # x_t is in the sums of the steps t + shift of its document.
        grad_x_TD = tl.zeros((TILE, BLOCK), tl.float32)
        seen_T = in_T
        for shift in tl.static_range(TAPS):
            if shift > 0:
                seen_T = _goes_on(starts, t_T + shift, seen_T & (t_T + shift < length), i, batch)
            g_TD = _tile(dy, t_T + shift, seen_T, i, dy_step, dy_row, channel_D, in_D)
            if SILU:
                later_T = t_T + shift
                s_TD = _sums(x, weight, bias, starts, later_T, seen_T, i, batch, step, row, channel_D, in_D, TAPS)
                sigmoid_TD = tl.sigmoid(s_TD)
                g_TD *= sigmoid_TD * (1 + s_TD * (1 - sigmoid_TD))
            grad_x_TD += g_TD * _weight(weight, shift, channel_D, in_D, TAPS)[None, :]
            if shift == 0:  # of the sums at t themselves
                grads_RD += tl.where(row_R[:, None] == TAPS, tl.sum(g_TD, 0)[None, :], 0.0)
                before_T = in_T
                for back in tl.static_range(TAPS):
                    if back > 0:
                        before_T = _goes_on(starts, t_T - (back - 1), before_T & (t_T >= back), i, batch)
                    x_TD = _tile(x, t_T - back, before_T, i, step, row, channel_D, in_D)
                    grads_RD += tl.where(row_R[:, None] == TAPS - 1 - back, tl.sum(g_TD * x_TD, 0)[None, :], 0.0)
        offset_TD = ((t_T * batch + i) * d)[:, None] + channel_D[None, :]
        tl.store(grad_x + offset_TD, grad_x_TD.to(grad_x.dtype.element_ty), mask=in_T[:, None] & in_D[None, :])
    program = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    offset_RD = (program.to(tl.int64) * (TAPS + 1) + row_R)[:, None] * d + channel_D[None, :]
    tl.store(grads + offset_RD, grads_RD, mask=(row_R <= TAPS)[:, None] & in_D[None, :])
