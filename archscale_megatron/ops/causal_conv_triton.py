"""Causal depthwise convolution in Triton, forward and backward, for any GPU: every tensor is read and written once.

A program walks through STEPS time steps of BLOCK channels of one row of the batch, from the last step to the first,
with the rows of the next UNROLL steps already on their way. Backward, it computes each step's sums before the
activation again, and from them their gradient g, once. The g of the steps that x_t goes into stay in registers until
the walk comes to t; those of the first steps after the walk's own, it computes as well.

Nothing is added atomically: torch adds up the partial sums over time and batch, so results repeat exactly.
"""

# Tuples of tensors grow in unrolled loops, which mypy takes for reassignments of another type.
# mypy: disable-error-code="assignment"
import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

STEPS, UNROLL = 64, 4
BLOCK, WARPS = 128, 1  # 4 neighbouring channels in a thread


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
        ctx.silu = activation == "silu"
        x = _dense_rows(x)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        inputs, strides = (x, weight.contiguous(), bias, starts), x.stride()[:2]
        _conv_forward_kernel[_grid(x)](*inputs, y, *x.shape, *strides, **_options(x, weight, ctx.silu, strides))
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
        inputs, strides = (x, weight.contiguous(), bias, starts, dy), (*x.stride()[:2], *dy.stride()[:2])
        options = _options(x, weight, ctx.silu, strides)
        _conv_backward_kernel[grid](*inputs, grad_x, grads, *x.shape, *strides, **options)
        total = grads.sum(0)
        grad_weight = total[:taps].t().unsqueeze(1).to(weight.dtype)
        grad_bias = None if bias is None else total[taps].to(bias.dtype)
        return grad_x, grad_weight, grad_bias, None, None


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _grid(x: Tensor) -> tuple[int, int, int]:
    length, batch, d = x.shape
    return triton.cdiv(d, BLOCK), triton.cdiv(length, STEPS), batch


def _options(x: Tensor, weight: Tensor, silu: bool, strides: tuple[int, ...]) -> dict[str, int | bool]:
    """The kernels' constants. ALIGNED divides d and all strides: it lets a thread load its channels at once."""
    constants = {"TAPS": weight.shape[-1], "SILU": silu, "ALIGNED": math.gcd(16, x.shape[-1], *strides)}
    return constants | {"BLOCK": BLOCK, "STEPS": STEPS, "UNROLL": UNROLL, "num_warps": WARPS}


# Names in the kernels end in what they hold: D a value for each channel; J one of those for each tap, where j belongs
# to a distance of j steps; R one for each of a number of steps, the latest first. `step` and `row` are the strides of
# time and batch of a [s, b, d] tensor whose d is dense; `i` is the row of the batch. Offsets are in 64 bits, as tensors
# may pass 2^31 elements.


@triton.jit
def _channels(length, d, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """(the program's channels, the number of steps of each: none past the last channel)."""
    channel_D = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    # The compiler heeds no tl.multiple_of an argument.
    return channel_D, tl.where(channel_D < d // ALIGNED * ALIGNED, length, 0)


@triton.jit
def _at(ptr_D, n, stride, ALIGNED: tl.constexpr):
    return ptr_D + tl.multiple_of(n.to(tl.int64) * stride, ALIGNED)


@triton.jit
def _rows(ptr_D, t, COUNT: tl.constexpr, length_D, step, ALIGNED: tl.constexpr):
    """COUNT rows, that of step t first; those outside of the sequence are 0."""
    row_R = ()
    for r in tl.static_range(COUNT):
        # As unsigned numbers, steps before the first are past the last.
        inside_D = tl.cast(t - r, tl.uint32) < tl.cast(length_D, tl.uint32)
        row_R = row_R + (tl.load(_at(ptr_D, t - r, step, ALIGNED), mask=inside_D, other=0),)
    return row_R


@triton.jit
def _starts(starts, t, COUNT: tl.constexpr, length, i, batch):
    """COUNT flags, that of step t first; none where there are no documents."""
    return () if starts is None else _rows(starts + i, t, COUNT, length, batch, 1)


@triton.jit
def _fp32(row_R):
    converted_R = ()
    for r in tl.static_range(len(row_R)):
        converted_R = converted_R + (row_R[r].to(tl.float32),)
    return converted_R


@triton.jit
def _parameters(weight, bias, channel_D, length_D, TAPS: tl.constexpr):
    """(the factors of the inputs j steps ago, the bias), in fp32."""
    weight_J = ()
    for j in tl.static_range(TAPS):
        weight_J = weight_J + (tl.load(weight + channel_D * TAPS + (TAPS - 1 - j), mask=length_D > 0, other=0),)
    bias_D = tl.zeros(channel_D.shape, tl.float32)
    if bias is not None:
        bias_D += tl.load(bias + channel_D, mask=length_D > 0, other=0)
    return _fp32(weight_J), bias_D


@triton.jit
def _dot(a_J, b_J, plus_D):
    for j in tl.static_range(len(a_J)):
        plus_D += a_J[j] * b_J[j]
    return plus_D


@triton.jit
def _sums(x_R, start_R, at: tl.constexpr, weight_J, bias_D):
    """What the activation is applied to at the step whose place in x_R is `at`."""
    x_J, seen = (x_R[at],), True
    for j in tl.static_range(1, len(weight_J)):
        x_D = x_R[at + j]
        if len(start_R) > 0:
            seen = seen & (start_R[at + j - 1] == 0)
            x_D = tl.where(seen, x_D, 0.0)
        x_J = x_J + (x_D,)
    return _dot(weight_J, x_J, bias_D)


@triton.jit
def _sigmoid(s_D):
    """1 / (1 + exp(-s)), for which a division takes three times the instructions."""
    root_D = tl.rsqrt(1 + tl.exp2(s_D * -1.4426950408889634))
    return root_D * root_D


@triton.jit
def _conv_forward_kernel(
    x, weight, bias, starts, y, length, batch, d, step, row,
    TAPS: tl.constexpr, SILU: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr, STEPS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(2)
    channel_D, length_D = _channels(length, d, BLOCK, ALIGNED)
    weight_J, bias_D = _parameters(weight, bias, channel_D, length_D, TAPS)
    x_D, y_D = _at(x + channel_D, i, row, ALIGNED), _at(y + channel_D, i, d, ALIGNED)

    t = tl.program_id(1) * STEPS + STEPS - 1
    x_R = _fp32(_rows(x_D, t, UNROLL + TAPS - 1, length_D, step, ALIGNED))
    start_R = _starts(starts, t, UNROLL + TAPS - 1, length, i, batch)
    for _ in range(STEPS // UNROLL):
        ahead = t - (UNROLL + TAPS - 1)
        next_x_R = _rows(x_D, ahead, UNROLL, length_D, step, ALIGNED)
        next_start_R = _starts(starts, ahead, UNROLL, length, i, batch)
        for u in tl.static_range(UNROLL):
            s_D = _sums(x_R, start_R, u, weight_J, bias_D)
            if SILU:
                s_D *= _sigmoid(s_D)
            tl.store(_at(y_D, t - u, batch * d, ALIGNED), s_D.to(y.dtype.element_ty), mask=t - u < length_D)
        x_R, start_R = x_R[UNROLL:] + _fp32(next_x_R), start_R[UNROLL:] + next_start_R
        t -= UNROLL


@triton.jit
def _gradient(dy_D, x_R, start_R, at: tl.constexpr, weight_J, bias_D, SILU: tl.constexpr):
    """The gradient of `_sums`."""
    if SILU:
        s_D = _sums(x_R, start_R, at, weight_J, bias_D)
        sigmoid_D = _sigmoid(s_D)
        dy_D *= sigmoid_D * (1 + s_D * (1 - sigmoid_D))
    return dy_D


@triton.jit
def _carry(g_J, start_R, at: tl.constexpr):
    """The gradients g at and after a step, but for the last, for the step before it: 0 if a document starts."""
    later_J = ()
    for j in tl.static_range(len(g_J) - 1):
        g_D = g_J[j]
        if len(start_R) > 0:
            g_D = tl.where(start_R[at] == 0, g_D, 0.0)
        later_J = later_J + (g_D,)
    return later_J


@triton.jit
def _conv_backward_kernel(
    x, weight, bias, starts, dy, grad_x, grads, length, batch, d, step, row, dy_step, dy_row,
    TAPS: tl.constexpr, SILU: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr, STEPS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(2)
    channel_D, length_D = _channels(length, d, BLOCK, ALIGNED)
    weight_J, bias_D = _parameters(weight, bias, channel_D, length_D, TAPS)
    x_D, dy_D = _at(x + channel_D, i, row, ALIGNED), _at(dy + channel_D, i, dy_row, ALIGNED)
    grad_x_D = _at(grad_x + channel_D, i, d, ALIGNED)
    zeros_D = tl.zeros(channel_D.shape, tl.float32)
    grad_weight_J, grad_bias_D = (zeros_D,) * TAPS, zeros_D

    # The steps after the walk's last
    AFTER: tl.constexpr = TAPS - 1
    t = tl.program_id(1) * STEPS + STEPS - 1
    x_R = _fp32(_rows(x_D, t + AFTER, UNROLL + 2 * AFTER, length_D, step, ALIGNED))
    dy_R = _fp32(_rows(dy_D, t + AFTER, UNROLL + AFTER, length_D, dy_step, ALIGNED))
    start_R = _starts(starts, t + AFTER, UNROLL + 2 * AFTER, length, i, batch)
    later_J = (zeros_D,) * AFTER
    for u in tl.static_range(AFTER):
        g_D = _gradient(dy_R[u], x_R, start_R, u, weight_J, bias_D, SILU)
        later_J = _carry((g_D,) + later_J, start_R, u)

    x_R, dy_R, start_R = x_R[AFTER:], dy_R[AFTER:], start_R[AFTER:]
    for _ in range(STEPS // UNROLL):
        next_x_R = _rows(x_D, t - AFTER - UNROLL, UNROLL, length_D, step, ALIGNED)
        next_dy_R = _rows(dy_D, t - UNROLL, UNROLL, length_D, dy_step, ALIGNED)
        next_start_R = _starts(starts, t - AFTER - UNROLL, UNROLL, length, i, batch)
        for u in tl.static_range(UNROLL):
            g_D = _gradient(dy_R[u], x_R, start_R, u, weight_J, bias_D, SILU)
            g_J = (g_D,) + later_J
            later_J = _carry(g_J, start_R, u)
            out_D = _dot(weight_J, g_J, zeros_D).to(grad_x.dtype.element_ty)
            tl.store(_at(grad_x_D, t - u, batch * d, ALIGNED), out_D, mask=t - u < length_D)
            added_J = ()
            for j in tl.static_range(TAPS):
                added_J = added_J + (grad_weight_J[j] + g_J[j] * x_R[u],)
            grad_weight_J, grad_bias_D = added_J, grad_bias_D + g_D
        x_R, dy_R, start_R = x_R[UNROLL:] + _fp32(next_x_R), _fp32(next_dy_R), start_R[UNROLL:] + next_start_R
        t -= UNROLL

    first = (i * tl.num_programs(1) + tl.program_id(1)) * (TAPS + 1)
    for j in tl.static_range(TAPS):
        tl.store(_at(grads + channel_D, first + TAPS - 1 - j, d, ALIGNED), grad_weight_J[j], mask=length_D > 0)
    tl.store(_at(grads + channel_D, first + TAPS, d, ALIGNED), grad_bias_D, mask=length_D > 0)
