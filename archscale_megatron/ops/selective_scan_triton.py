"""Selective scan in Triton, forward and backward, for any GPU.

A tile is TILE time steps by BLOCK_D channels by all n states. It is scanned at once, with
`tl.associative_scan`, and the state is carried from tile to tile. The state before each tile is kept for the
backward pass, which first carries the state's gradient from the last tile to the first (one kernel); then all
tiles are independent (another kernel). Nothing is added atomically: torch adds up the partial sums over
channels or tiles, so results repeat exactly.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 32  # time steps
STATES_PER_STEP = 64  # BLOCK_D x n: a tile of 2048 states is 16 registers a thread with 4 warps of 32
BLOCKS_PER_PROGRAM = 32  # channel blocks whose share of dB and dC one program adds up


def scan_forward(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `selective_scan_torch.scan_forward`, with the states before each tile as [tiles, b, d, n]."""
    (length, batch, d), n = x.shape, A.shape[1]
    x, delta, A, B, C, D = (v.contiguous() for v in (x, delta, A, B, C, D))
    blocks = _blocks(n)
    y = torch.empty_like(x)
    states = delta.new_empty(triton.cdiv(length, TILE), batch, d, n)
    grid = (triton.cdiv(d, blocks["BLOCK_D"]), batch)
    _forward_kernel[grid](x, delta, A, B, C, D, _as_int8(starts), y, states, length, batch, d, n, **blocks)
    return y, states


def scan_backward(
    dy: Tensor,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    starts: Tensor | None,
    states: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `selective_scan_torch.scan_backward`."""
    (length, batch, d), n = x.shape, A.shape[1]
    dy, x, delta, A, B, C, D = (v.contiguous() for v in (dy, x, delta, A, B, C, D))
    starts = _as_int8(starts)
    blocks = _blocks(n)
    tiles, d_blocks = len(states), triton.cdiv(d, blocks["BLOCK_D"])
    groups = triton.cdiv(d_blocks, BLOCKS_PER_PROGRAM)

    carries = torch.empty_like(states)  # dL/dh of the first step after each tile
    _carry_kernel[d_blocks, batch](dy, delta, A, C, starts, carries, length, batch, d, n, **blocks)

    grad_x, grad_delta = torch.empty_like(delta), torch.empty_like(delta)
    grad_A = torch.empty_like(states)
    grad_B, grad_C = (delta.new_empty(groups, length, batch, n) for _ in range(2))
    grad_D = delta.new_empty(tiles, batch, d)
    inputs = (dy, x, delta, A, B, C, D, starts, states, carries)
    grads = (grad_x, grad_delta, grad_A, grad_B, grad_C, grad_D)
    # With 4 warps, its registers spill.
    _backward_kernel[tiles, batch, groups](
        *inputs, *grads, length, batch, d, n, BLOCKS=BLOCKS_PER_PROGRAM, num_warps=8, **blocks
    )
    return grad_x, grad_delta, grad_A.sum((0, 1)), grad_B.sum(0), grad_C.sum(0), grad_D.sum((0, 1))


def _blocks(n: int) -> dict[str, int]:
    block_n = triton.next_power_of_2(n)
    return {"TILE": TILE, "BLOCK_D": max(1, STATES_PER_STEP // block_n), "BLOCK_N": block_n}


def _as_int8(starts: Tensor | None) -> Tensor | None:
    return None if starts is None else starts.contiguous().view(torch.int8)


# Names in the kernels end in the tile's shape: T time steps, D channels, N states. Step t of batch element i
# is row t b + i of an [s, b, ...] tensor, in 64 bits since such tensors may pass 2^31 elements.


@triton.jit
def _compose(a1, b1, a2, b2):
    """h -> a2 (a1 h + b1) + b2"""
    return a1 * a2, a2 * b1 + b2


@triton.jit
def _tile(ptr, row_T, in_T, column, in_column, width):
    """Rows of a [s, b, width] tensor in fp32, 0 outside of it."""
    mask = in_T[:, None] & in_column[None, :]
    return tl.load(ptr + row_T[:, None] * width + column[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _decay(delta_TD, A_DN, starts, row_T, in_T):
    """exp(delta A), 0 where a document starts."""
    a_TDN = tl.exp(delta_TD[:, :, None] * A_DN[None, :, :])
    if starts is not None:
        start_T = tl.load(starts + row_T, mask=in_T, other=0)
        a_TDN = tl.where(start_T[:, None, None] != 0, 0.0, a_TDN)
    return a_TDN


@triton.jit
def _forward_kernel(
    x, delta, A, B, C, D, starts, y, states, length, batch, d, n,
    TILE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(1)
    step_T = tl.arange(0, TILE)
    channel_D = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    state_N = tl.arange(0, BLOCK_N)
    in_D, in_N = channel_D < d, state_N < n
    in_DN = in_D[:, None] & in_N[None, :]
    offset_DN = channel_D[:, None] * n + state_N[None, :]
    A_DN = tl.load(A + offset_DN, mask=in_DN, other=0.0)
    D_D = tl.load(D + channel_D, mask=in_D, other=0.0)

    h_DN = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    for tile in range(tl.cdiv(length, TILE)):
        tl.store(states + (tile * batch + i).to(tl.int64) * d * n + offset_DN, h_DN, mask=in_DN)
        in_T = tile * TILE + step_T < length
        row_T = (tile * TILE + step_T).to(tl.int64) * batch + i
        x_TD = _tile(x, row_T, in_T, channel_D, in_D, d)
        delta_TD = _tile(delta, row_T, in_T, channel_D, in_D, d)
        B_TN = _tile(B, row_T, in_T, state_N, in_N, n)
        C_TN = _tile(C, row_T, in_T, state_N, in_N, n)
        a_TDN = _decay(delta_TD, A_DN, starts, row_T, in_T)
        decay_TDN, h_TDN = tl.associative_scan((a_TDN, (delta_TD * x_TD)[:, :, None] * B_TN[:, None, :]), 0, _compose)
        h_TDN += decay_TDN * h_DN[None, :, :]
        y_TD = tl.sum(h_TDN * C_TN[:, None, :], 2) + x_TD * D_D[None, :]
        mask = in_T[:, None] & in_D[None, :]
        tl.store(y + row_T[:, None] * d + channel_D[None, :], y_TD.to(y.dtype.element_ty), mask=mask)
        h_DN = tl.sum(tl.where(step_T[:, None, None] == TILE - 1, h_TDN, 0.0), 0)


@triton.jit
def _state_gradient(dy_TD, C_TN, delta, A_DN, starts, next_g_DN, step_T, length, batch, i, channel_D, in_D, d):
    """g_t = C_t dy_t + a_{t+1} g_{t+1} for the tile of steps step_T; next_g is g at the step after it."""
    in_T = step_T + 1 < length
    row_T = (step_T + 1).to(tl.int64) * batch + i
    a_TDN = _decay(_tile(delta, row_T, in_T, channel_D, in_D, d), A_DN, starts, row_T, in_T)
    source_TDN = dy_TD[:, :, None] * C_TN[:, None, :]
    decay_TDN, g_TDN = tl.associative_scan((a_TDN, source_TDN), 0, _compose, reverse=True)
    return g_TDN + decay_TDN * next_g_DN[None, :, :]


@triton.jit
def _carry_kernel(
    dy, delta, A, C, starts, carries, length, batch, d, n,
    TILE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(1)
    channel_D = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    state_N = tl.arange(0, BLOCK_N)
    in_D, in_N = channel_D < d, state_N < n
    in_DN = in_D[:, None] & in_N[None, :]
    offset_DN = channel_D[:, None] * n + state_N[None, :]
    A_DN = tl.load(A + offset_DN, mask=in_DN, other=0.0)

    g_DN = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    tiles = tl.cdiv(length, TILE)
    for k in range(tiles):
        tile = tiles - 1 - k
        tl.store(carries + (tile * batch + i).to(tl.int64) * d * n + offset_DN, g_DN, mask=in_DN)
        step_T = tile * TILE + tl.arange(0, TILE)
        in_T = step_T < length
        row_T = step_T.to(tl.int64) * batch + i
        dy_TD = _tile(dy, row_T, in_T, channel_D, in_D, d)
        C_TN = _tile(C, row_T, in_T, state_N, in_N, n)
        g_TDN = _state_gradient(dy_TD, C_TN, delta, A_DN, starts, g_DN, step_T, length, batch, i, channel_D, in_D, d)
        g_DN = tl.sum(tl.where(step_T[:, None, None] == tile * TILE, g_TDN, 0.0), 0)


@triton.jit
def _backward_kernel(
    dy, x, delta, A, B, C, D, starts, states, carries,
    grad_x, grad_delta, grad_A, grad_B, grad_C, grad_D, length, batch, d, n,
    BLOCKS: tl.constexpr, TILE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile, i, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    step_T = tile * TILE + tl.arange(0, TILE)
    state_N = tl.arange(0, BLOCK_N)
    in_T, in_N = step_T < length, state_N < n
    row_T = step_T.to(tl.int64) * batch + i
    tile_row = (tile * batch + i).to(tl.int64)
    B_TN = _tile(B, row_T, in_T, state_N, in_N, n)
    C_TN = _tile(C, row_T, in_T, state_N, in_N, n)
    grad_B_TN = tl.zeros((TILE, BLOCK_N), tl.float32)
    grad_C_TN = tl.zeros((TILE, BLOCK_N), tl.float32)

    first_block = group * BLOCKS
    for block in range(first_block, tl.minimum(first_block + BLOCKS, tl.cdiv(d, BLOCK_D))):
        channel_D = block * BLOCK_D + tl.arange(0, BLOCK_D)
        in_D = channel_D < d
        in_DN = in_D[:, None] & in_N[None, :]
        offset_DN = channel_D[:, None] * n + state_N[None, :]
        A_DN = tl.load(A + offset_DN, mask=in_DN, other=0.0)
        D_D = tl.load(D + channel_D, mask=in_D, other=0.0)
        h_DN = tl.load(states + tile_row * d * n + offset_DN, mask=in_DN, other=0.0)
        next_g_DN = tl.load(carries + tile_row * d * n + offset_DN, mask=in_DN, other=0.0)
        dy_TD = _tile(dy, row_T, in_T, channel_D, in_D, d)
        x_TD = _tile(x, row_T, in_T, channel_D, in_D, d)
        delta_TD = _tile(delta, row_T, in_T, channel_D, in_D, d)

        a_TDN = _decay(delta_TD, A_DN, starts, row_T, in_T)
        drive_TDN = (delta_TD * x_TD)[:, :, None] * B_TN[:, None, :]
        decay_TDN, h_TDN = tl.associative_scan((a_TDN, drive_TDN), 0, _compose)
        h_TDN += decay_TDN * h_DN[None, :, :]
        g_TDN = _state_gradient(
            dy_TD, C_TN, delta, A_DN, starts, next_g_DN, step_T, length, batch, i, channel_D, in_D, d
        )

        grad_C_TN += tl.sum(h_TDN * dy_TD[:, :, None], 1)
        grad_B_TN += tl.sum(g_TDN * (delta_TD * x_TD)[:, :, None], 1)
        grad_drive_TD = tl.sum(g_TDN * B_TN[:, None, :], 2)
        grad_exponent_TDN = g_TDN * (h_TDN - drive_TDN)  # the difference is a_t h_{t-1}
        grad_delta_TD = tl.sum(grad_exponent_TDN * A_DN[None, :, :], 2) + grad_drive_TD * x_TD
        grad_x_TD = grad_drive_TD * delta_TD + dy_TD * D_D[None, :]
        mask = in_T[:, None] & in_D[None, :]
        offset_TD = row_T[:, None] * d + channel_D[None, :]
        tl.store(grad_x + offset_TD, grad_x_TD, mask=mask)
        tl.store(grad_delta + offset_TD, grad_delta_TD, mask=mask)
        grad_A_DN = tl.sum(grad_exponent_TDN * delta_TD[:, :, None], 0)
        tl.store(grad_A + tile_row * d * n + offset_DN, grad_A_DN, mask=in_DN)
        tl.store(grad_D + tile_row * d + channel_D, tl.sum(dy_TD * x_TD, 0), mask=in_D)

    mask = in_T[:, None] & in_N[None, :]
    offset_TN = (group.to(tl.int64) * length * batch + row_T)[:, None] * n + state_N[None, :]
    tl.store(grad_B + offset_TN, grad_B_TN, mask=mask)
    tl.store(grad_C + offset_TN, grad_C_TN, mask=mask)
