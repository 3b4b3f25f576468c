"""Triton kernels that walk through the time of a selective scan; `selective_scan_triton` says how they work together.

Names end in a tensor's axes: T time steps, D channels, N states. Step t of batch element i is row t b + i of an
[s, b, ...] tensor; offsets are in 64 bits, since such tensors may pass 2^31 elements.
"""
# mypy: ignore-errors
# Triton's language is not quite Python's: tuples grow in loops that the compiler unrolls.

import triton
import triton.language as tl

# A step size for the decay's exponent where a document starts: nothing is left of the state. It is not infinite, as
# A is 0 for states that only pad a block.
HUGE: tl.constexpr = tl.constexpr(3e38)


@triton.jit
def _softplus(z):
    """(log(1 + exp(z)), its derivative), to 2e-7 of themselves."""
    e = tl.exp(-tl.abs(z))
    # log(1 + e) / e for e in [0, 1], from a Chebyshev fit: cheaper than a logarithm, and right for small e too
    p = e * 0.005253457929939032 - 0.02958850748836994
    p = p * e + 0.07836166769266129
    p = p * e - 0.13674770295619965
    p = p * e + 0.19111430644989014
    p = p * e - 0.24844369292259216
    p = p * e + 0.33319270610809326
    p = p * e - 0.49999502301216125
    p = p * e + 1.0
    return tl.maximum(z, 0.0) + e * p, tl.where(z > 0, 1.0, e) / (1 + e)


@triton.jit
def _row(ptr, t, length, batch, i, stride, column, in_column):
    """Row t of batch element i, or the last row for later steps, so that nothing outside is read."""
    pointers = ptr + (tl.minimum(t, length - 1).to(tl.int64) * batch + i) * stride + column
    return tl.load(pointers) if in_column is None else tl.load(pointers, mask=in_column, other=0.0)


@triton.jit
def _states_row(ptr, t, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Row t of one batch element's B or C, for every channel."""
    row_N = tl.load(ptr + t * BLOCK_N + tl.arange(0, BLOCK_N))
    return tl.broadcast_to(row_N[:, None], (BLOCK_N, BLOCK_D))


@triton.jit
def _reset(delta_D, starts, t, length, batch, i):
    """delta for the decay's exponent: where a document starts, so large that nothing is left of the state."""
    if starts is not None:
        start = tl.load(starts + tl.minimum(t, length - 1).to(tl.int64) * batch + i)
        delta_D = tl.where(start != 0, HUGE, delta_D)
    return delta_D


@triton.jit
def _step_size(dt_D, bias_D, starts, t, length, batch, i):
    """delta, and delta as `_reset` makes it."""
    delta_D, _ = _softplus(dt_D.to(tl.float32) + bias_D)
    return delta_D, _reset(delta_D, starts, t, length, batch, i)


@triton.jit
def _scan_forward_kernel(
    x, dt, A, B, C, D, dt_bias, starts, y, states, chunk_states, chunk_decays,
    length, batch, d, x_stride, dt_stride, chunk_tiles, steps,
    TILE: tl.constexpr, UNROLL: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN_D: tl.constexpr, OUTPUT: tl.constexpr,
):  # fmt: skip
    """The scan of one chunk of time, for BLOCK_D channels of one batch element.

    With OUTPUT, from the chunk's initial state: writes y, and the state before each tile. Without, from zero:
    writes the state after the chunk, and what is left then of the state before it.
    """
    i, chunk = tl.program_id(1), tl.program_id(2)
    # As the compiler may assume no alignment, each thread gets single channels, with all their states.
    channel_D = tl.multiple_of(tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D), 1)
    state_N = tl.arange(0, BLOCK_N)
    in_D = (channel_D < d) | EVEN_D
    in_ND = in_D[None, :] & (state_N[:, None] >= 0)
    offset_ND = channel_D[None, :] + state_N[:, None] * d
    A_ND = tl.load(A + offset_ND, mask=in_ND, other=0.0)
    D_D = tl.load(D + channel_D, mask=in_D, other=0.0)
    bias_D = tl.zeros((BLOCK_D,), tl.float32)
    if dt_bias is not None:
        bias_D = tl.load(dt_bias + channel_D, mask=in_D, other=0.0)

    # A and the states of chunks lie in memory as [n, d], those of tiles as [d, n].
    state_ND = channel_D[None, :] * BLOCK_N + state_N[:, None]
    chunk_row = (chunk * batch + i).to(tl.int64) * d * BLOCK_N
    if OUTPUT:
        h_ND = tl.load(chunk_states + chunk_row + offset_ND, mask=in_ND, other=0.0)
    else:
        h_ND = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    total_D = tl.zeros((BLOCK_D,), tl.float32)
    B += i.to(tl.int64) * steps * BLOCK_N
    C += i.to(tl.int64) * steps * BLOCK_N

    first_tile = chunk * chunk_tiles
    first = first_tile * TILE
    # Rows are loaded UNROLL steps ahead.
    x_U, dt_U, B_U, C_U = (), (), (), ()
    for u in tl.static_range(UNROLL):
        x_U = x_U + (_row(x, first + u, length, batch, i, x_stride, channel_D, in_D),)
        dt_U = dt_U + (_row(dt, first + u, length, batch, i, dt_stride, channel_D, in_D),)
        B_U = B_U + (_states_row(B, first + u, BLOCK_N, BLOCK_D),)
        C_U = C_U + (_states_row(C, first + u, BLOCK_N, BLOCK_D),)

    for tile in range(first_tile, tl.minimum(first_tile + chunk_tiles, tl.cdiv(length, TILE))):
        if OUTPUT:
            tl.store(states + (tile * batch + i).to(tl.int64) * d * BLOCK_N + state_ND, h_ND, mask=in_ND)
        for first in range(tile * TILE, tile * TILE + TILE, UNROLL):
            next_x, next_dt, next_B, next_C = (), (), (), ()
            for u in tl.static_range(UNROLL):
                t = first + u
                x_D = x_U[u].to(tl.float32)
                delta_D, exponent_D = _step_size(dt_U[u], bias_D, starts, t, length, batch, i)
                drive_ND = (delta_D * x_D)[None, :] * B_U[u]
                h_ND = tl.exp2(exponent_D[None, :] * A_ND) * h_ND + drive_ND
                if OUTPUT:
                    y_D = tl.sum(h_ND * C_U[u], 0) + x_D * D_D
                    row = t.to(tl.int64) * batch + i
                    tl.store(y + row * d + channel_D, y_D.to(y.dtype.element_ty), mask=in_D & (t < length))
                else:
                    total_D = tl.minimum(total_D + exponent_D, HUGE)
                ahead = t + UNROLL
                next_x = next_x + (_row(x, ahead, length, batch, i, x_stride, channel_D, in_D),)
                next_dt = next_dt + (_row(dt, ahead, length, batch, i, dt_stride, channel_D, in_D),)
                next_B = next_B + (_states_row(B, ahead, BLOCK_N, BLOCK_D),)
                next_C = next_C + (_states_row(C, ahead, BLOCK_N, BLOCK_D),)
            x_U, dt_U, B_U, C_U = next_x, next_dt, next_B, next_C

    if not OUTPUT:
        tl.store(chunk_states + chunk_row + offset_ND, h_ND, mask=in_ND)
        tl.store(chunk_decays + chunk_row + offset_ND, tl.exp2(total_D[None, :] * A_ND), mask=in_ND)


@triton.jit
def _scan_carry_kernel(
    dy, dt, A, C, dt_bias, starts, carries, chunk_carries, chunk_decays,
    length, batch, d, dy_stride, dt_stride, chunk_tiles, steps,
    TILE: tl.constexpr, UNROLL: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN_D: tl.constexpr, OUTPUT: tl.constexpr,
):  # fmt: skip
    """As _scan_forward_kernel, but of the state's gradient, from the last step to the first.

    Carried from step to step is dL/dh as later steps make it: g_t = C_t dy_t + carry, then carry = a_t g_t.
    """
    i, chunk = tl.program_id(1), tl.program_id(2)
    channel_D = tl.multiple_of(tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D), 1)
    state_N = tl.arange(0, BLOCK_N)
    in_D = (channel_D < d) | EVEN_D
    in_ND = in_D[None, :] & (state_N[:, None] >= 0)
    offset_ND = channel_D[None, :] + state_N[:, None] * d
    A_ND = tl.load(A + offset_ND, mask=in_ND, other=0.0)
    bias_D = tl.zeros((BLOCK_D,), tl.float32)
    if dt_bias is not None:
        bias_D = tl.load(dt_bias + channel_D, mask=in_D, other=0.0)

    # A and the states of chunks lie in memory as [n, d], those of tiles as [d, n].
    state_ND = channel_D[None, :] * BLOCK_N + state_N[:, None]
    chunk_row = (chunk * batch + i).to(tl.int64) * d * BLOCK_N
    if OUTPUT:
        carry_ND = tl.load(chunk_carries + chunk_row + offset_ND, mask=in_ND, other=0.0)
    else:
        carry_ND = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    total_D = tl.zeros((BLOCK_D,), tl.float32)
    C += i.to(tl.int64) * steps * BLOCK_N

    first_tile = chunk * chunk_tiles
    end_tile = tl.minimum(first_tile + chunk_tiles, tl.cdiv(length, TILE))
    last = end_tile * TILE - 1
    dy_U, dt_U, C_U = (), (), ()
    for u in tl.static_range(UNROLL):
        dy_U = dy_U + (_row(dy, last - u, length, batch, i, dy_stride, channel_D, in_D),)
        dt_U = dt_U + (_row(dt, last - u, length, batch, i, dt_stride, channel_D, in_D),)
        C_U = C_U + (_states_row(C, last - u, BLOCK_N, BLOCK_D),)

    for tiles_before in range(0, end_tile - first_tile):
        tile = end_tile - 1 - tiles_before
        if OUTPUT:
            tl.store(carries + (tile * batch + i).to(tl.int64) * d * BLOCK_N + state_ND, carry_ND, mask=in_ND)
        for steps_before in range(0, TILE, UNROLL):
            next_dy, next_dt, next_C = (), (), ()
            for u in tl.static_range(UNROLL):
                t = tile * TILE + TILE - 1 - steps_before - u
                dy_D = tl.where(t < length, dy_U[u].to(tl.float32), 0.0)
                _, exponent_D = _step_size(dt_U[u], bias_D, starts, t, length, batch, i)
                g_ND = dy_D[None, :] * C_U[u] + carry_ND
                carry_ND = tl.exp2(exponent_D[None, :] * A_ND) * g_ND
                if not OUTPUT:
                    total_D = tl.minimum(total_D + exponent_D, HUGE)
                ahead = tl.maximum(t - UNROLL, 0)
                next_dy = next_dy + (_row(dy, ahead, length, batch, i, dy_stride, channel_D, in_D),)
                next_dt = next_dt + (_row(dt, ahead, length, batch, i, dt_stride, channel_D, in_D),)
                next_C = next_C + (_states_row(C, ahead, BLOCK_N, BLOCK_D),)
            dy_U, dt_U, C_U = next_dy, next_dt, next_C

    if not OUTPUT:
        tl.store(chunk_carries + chunk_row + offset_ND, carry_ND, mask=in_ND)
        tl.store(chunk_decays + chunk_row + offset_ND, tl.exp2(total_D[None, :] * A_ND), mask=in_ND)
