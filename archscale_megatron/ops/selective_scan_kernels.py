"""Triton kernels of the selective scan; `selective_scan_triton` says how they work together.

Names end in a tensor's axes: T time steps, D channels, N states. Step t of batch element i is row t b + i of an
[s, b, ...] tensor; offsets are in 64 bits, since such tensors may pass 2^31 elements.
"""

import triton
import triton.language as tl


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
def _states_row(ptr, t, length, batch, i, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """As _row, of B or C, for every channel."""
    state_N = tl.arange(0, BLOCK_N)
    row_N = tl.load(ptr + (tl.minimum(t, length - 1).to(tl.int64) * batch + i) * BLOCK_N + state_N)
    return tl.broadcast_to(row_N[:, None], (BLOCK_N, BLOCK_D))


@triton.jit
def _reset(delta_D, starts, t, length, batch, i):
    """delta for the decay's exponent: where a document starts, so large that nothing is left of the state."""
    if starts is not None:
        start = tl.load(starts + tl.minimum(t, length - 1).to(tl.int64) * batch + i)
        delta_D = tl.where(start != 0, 3e38, delta_D)
    return delta_D


@triton.jit
def _step_size(dt_D, bias_D, starts, t, length, batch, i):
    """delta, and delta as `_reset` makes it."""
    delta_D, _ = _softplus(dt_D.to(tl.float32) + bias_D)
    return delta_D, _reset(delta_D, starts, t, length, batch, i)


@triton.jit
def _forward_kernel(
    x, dt, A, B, C, D, dt_bias, starts, y, states, chunk_states, chunk_decays,
    length, batch, d, x_stride, dt_stride, chunk_tiles,
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

    chunk_row = (chunk * batch + i).to(tl.int64) * BLOCK_N * d
    if OUTPUT:
        h_ND = tl.load(chunk_states + chunk_row + offset_ND, mask=in_ND, other=0.0)
    else:
        h_ND = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    total_D = tl.zeros((BLOCK_D,), tl.float32)

    first_tile = chunk * chunk_tiles
    first = first_tile * TILE
    # Rows are loaded UNROLL steps ahead.
    x_U, dt_U, B_U, C_U = (), (), (), ()
    for u in tl.static_range(UNROLL):
        x_U = x_U + (_row(x, first + u, length, batch, i, x_stride, channel_D, in_D),)
        dt_U = dt_U + (_row(dt, first + u, length, batch, i, dt_stride, channel_D, in_D),)
        B_U = B_U + (_states_row(B, first + u, length, batch, i, BLOCK_N, BLOCK_D),)
        C_U = C_U + (_states_row(C, first + u, length, batch, i, BLOCK_N, BLOCK_D),)

    for tile in range(first_tile, tl.minimum(first_tile + chunk_tiles, tl.cdiv(length, TILE))):
        if OUTPUT:
            tl.store(states + (tile * batch + i).to(tl.int64) * BLOCK_N * d + offset_ND, h_ND, mask=in_ND)
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
                    total_D = tl.minimum(total_D + exponent_D, 3e38)  # not infinite: A may be 0, in padding
                ahead = t + UNROLL
                next_x = next_x + (_row(x, ahead, length, batch, i, x_stride, channel_D, in_D),)
                next_dt = next_dt + (_row(dt, ahead, length, batch, i, dt_stride, channel_D, in_D),)
                next_B = next_B + (_states_row(B, ahead, length, batch, i, BLOCK_N, BLOCK_D),)
                next_C = next_C + (_states_row(C, ahead, length, batch, i, BLOCK_N, BLOCK_D),)
            x_U, dt_U, B_U, C_U = next_x, next_dt, next_B, next_C

    if not OUTPUT:
        tl.store(chunk_states + chunk_row + offset_ND, h_ND, mask=in_ND)
        tl.store(chunk_decays + chunk_row + offset_ND, tl.exp2(total_D[None, :] * A_ND), mask=in_ND)


@triton.jit
def _carry_kernel(
    dy, dt, A, C, dt_bias, starts, carries, chunk_carries, chunk_decays,
    length, batch, d, dy_stride, dt_stride, chunk_tiles,
    TILE: tl.constexpr, UNROLL: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN_D: tl.constexpr, OUTPUT: tl.constexpr,
):  # fmt: skip
    """As _forward_kernel, but of the state's gradient, from the last step to the first.

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

    chunk_row = (chunk * batch + i).to(tl.int64) * BLOCK_N * d
    if OUTPUT:
        carry_ND = tl.load(chunk_carries + chunk_row + offset_ND, mask=in_ND, other=0.0)
    else:
        carry_ND = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    total_D = tl.zeros((BLOCK_D,), tl.float32)

    first_tile = chunk * chunk_tiles
    end_tile = tl.minimum(first_tile + chunk_tiles, tl.cdiv(length, TILE))
    last = end_tile * TILE - 1
    dy_U, dt_U, C_U = (), (), ()
    for u in tl.static_range(UNROLL):
        dy_U = dy_U + (_row(dy, last - u, length, batch, i, dy_stride, channel_D, in_D),)
        dt_U = dt_U + (_row(dt, last - u, length, batch, i, dt_stride, channel_D, in_D),)
        C_U = C_U + (_states_row(C, last - u, length, batch, i, BLOCK_N, BLOCK_D),)

    for tiles_before in range(0, end_tile - first_tile):
        tile = end_tile - 1 - tiles_before
        if OUTPUT:
            tl.store(carries + (tile * batch + i).to(tl.int64) * BLOCK_N * d + offset_ND, carry_ND, mask=in_ND)
        for steps_before in range(0, TILE, UNROLL):
            next_dy, next_dt, next_C = (), (), ()
            for u in tl.static_range(UNROLL):
                t = tile * TILE + TILE - 1 - steps_before - u
                dy_D = tl.where(t < length, dy_U[u].to(tl.float32), 0.0)
                _, exponent_D = _step_size(dt_U[u], bias_D, starts, t, length, batch, i)
                g_ND = dy_D[None, :] * C_U[u] + carry_ND
                carry_ND = tl.exp2(exponent_D[None, :] * A_ND) * g_ND
                if not OUTPUT:
                    total_D = tl.minimum(total_D + exponent_D, 3e38)  # not infinite: A may be 0, in padding
                ahead = tl.maximum(t - UNROLL, 0)
                next_dy = next_dy + (_row(dy, ahead, length, batch, i, dy_stride, channel_D, in_D),)
                next_dt = next_dt + (_row(dt, ahead, length, batch, i, dt_stride, channel_D, in_D),)
                next_C = next_C + (_states_row(C, ahead, length, batch, i, BLOCK_N, BLOCK_D),)
            dy_U, dt_U, C_U = next_dy, next_dt, next_C

    if not OUTPUT:
        tl.store(chunk_carries + chunk_row + offset_ND, carry_ND, mask=in_ND)
        tl.store(chunk_decays + chunk_row + offset_ND, tl.exp2(total_D[None, :] * A_ND), mask=in_ND)


@triton.jit
def _backward_kernel(
    dy, x, dt, A, B, C, D, dt_bias, starts, states, carries, tile_steps, tile_states,
    grad_x, grad_dt, grad_A, grad_B, grad_C, grad_D, grad_bias,
    length, batch, d, dy_stride, x_stride, dt_stride,
    BLOCKS: tl.constexpr, TILE: tl.constexpr, UNROLL: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN_D: tl.constexpr,
):  # fmt: skip
    """All gradients from one tile of time, for BLOCKS x BLOCK_D channels of one batch element.

    tile_steps and tile_states are this program's own scratch: step sizes and their derivatives, and the states
    before every UNROLL steps of the tile.
    """
    tile, i, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    program = ((group * batch + i) * tl.num_programs(0) + tile).to(tl.int64)
    tile_row = (tile * batch + i).to(tl.int64)
    state_N = tl.arange(0, BLOCK_N)
    block_D = tl.arange(0, BLOCK_D)
    block_DN = block_D[:, None] * BLOCK_N + state_N[None, :]
    step_T = tl.arange(0, TILE)
    block_TD = step_T[:, None] * BLOCK_D + block_D[None, :]
    tile_steps += program * (2 * TILE * BLOCK_D)
    tile_states += program * ((TILE // UNROLL) * BLOCK_D * BLOCK_N)
    row_T = tl.minimum(tile * TILE + step_T, length - 1).to(tl.int64) * batch + i

    first_block = group * BLOCKS
    for block in range(first_block, tl.minimum(first_block + BLOCKS, tl.cdiv(d, BLOCK_D))):
        channel_D = block * BLOCK_D + block_D
        in_D = (channel_D < d) | EVEN_D
        in_DN = in_D[:, None] & (state_N[None, :] >= 0)
        offset_DN = channel_D[:, None] + state_N[None, :] * d
        A_DN = tl.load(A + offset_DN, mask=in_DN, other=0.0)
        h_DN = tl.load(states + tile_row * BLOCK_N * d + offset_DN, mask=in_DN, other=0.0)
        carry_DN = tl.load(carries + tile_row * BLOCK_N * d + offset_DN, mask=in_DN, other=0.0)
        D_D = tl.load(D + channel_D, mask=in_D, other=0.0)
        grad_A_DN = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
        grad_D_D = tl.zeros((BLOCK_D,), tl.float32)
        grad_bias_D = tl.zeros((BLOCK_D,), tl.float32)

        z_TD = tl.load(dt + row_T[:, None] * dt_stride + channel_D[None, :], mask=in_D[None, :], other=0.0)
        z_TD = z_TD.to(tl.float32)
        if dt_bias is not None:
            z_TD += tl.load(dt_bias + channel_D, mask=in_D, other=0.0)[None, :]
        delta_TD, slope_TD = _softplus(z_TD)
        tl.debug_barrier()  # the previous block's readers are done
        tl.store(tile_steps + block_TD, delta_TD)
        tl.store(tile_steps + TILE * BLOCK_D + block_TD, slope_TD)
        tl.debug_barrier()

        for k in range(TILE // UNROLL - 1):
            tl.store(tile_states + k * BLOCK_D * BLOCK_N + block_DN, h_DN)
            for u in tl.static_range(UNROLL):
                t = tile * TILE + k * UNROLL + u
                x_D = _row(x, t, length, batch, i, x_stride, channel_D, in_D).to(tl.float32)
                B_N = _row(B, t, length, batch, i, BLOCK_N, state_N, None)
                delta_D = tl.load(tile_steps + (k * UNROLL + u) * BLOCK_D + block_D)
                a_DN = tl.exp2(_reset(delta_D, starts, t, length, batch, i)[:, None] * A_DN)
                h_DN = a_DN * h_DN + (delta_D * x_D)[:, None] * B_N[None, :]
        tl.debug_barrier()

        for k in range(TILE // UNROLL):
            group_step = TILE - UNROLL - k * UNROLL
            first = tile * TILE + group_step
            h_U, a_U, x_U, dy_U, delta_U, slope_U, B_U, C_U = (h_DN,), (), (), (), (), (), (), ()
            for u in tl.static_range(UNROLL):
                t = first + u
                x_D = _row(x, t, length, batch, i, x_stride, channel_D, in_D).to(tl.float32)
                B_N = _row(B, t, length, batch, i, BLOCK_N, state_N, None)
                delta_D = tl.load(tile_steps + (group_step + u) * BLOCK_D + block_D)
                slope_U = slope_U + (tl.load(tile_steps + (TILE + group_step + u) * BLOCK_D + block_D),)
                dy_D = _row(dy, t, length, batch, i, dy_stride, channel_D, in_D).to(tl.float32)
                dy_U = dy_U + (tl.where(t < length, dy_D, 0.0),)
                C_U = C_U + (_row(C, t, length, batch, i, BLOCK_N, state_N, None),)
                a_DN = tl.exp2(_reset(delta_D, starts, t, length, batch, i)[:, None] * A_DN)
                h_DN = a_DN * h_DN + (delta_D * x_D)[:, None] * B_N[None, :]
                h_U, a_U, x_U, delta_U, B_U = (
                    h_U + (h_DN,),
                    a_U + (a_DN,),
                    x_U + (x_D,),
                    delta_U + (delta_D,),
                    B_U + (B_N,),
                )
            h_DN = tl.load(tile_states + tl.maximum(TILE // UNROLL - 2 - k, 0) * BLOCK_D * BLOCK_N + block_DN)

            for u in tl.static_range(UNROLL - 1, -1, -1):
                t = first + u
                row = t.to(tl.int64) * batch + i
                dy_D, x_D, delta_D, B_N = dy_U[u], x_U[u], delta_U[u], B_U[u]
                g_DN = dy_D[:, None] * C_U[u][None, :] + carry_DN
                carry_DN = a_U[u] * g_DN
                grad_exponent_DN = carry_DN * h_U[u]
                grad_A_DN += grad_exponent_DN * delta_D[:, None]
                grad_D_D += dy_D * x_D
                grad_drive_D = tl.sum(g_DN * B_N[None, :], 1)
                grad_delta_D = tl.sum(grad_exponent_DN * A_DN, 1) * 0.6931471805599453 + grad_drive_D * x_D
                grad_dt_D = grad_delta_D * slope_U[u]
                grad_bias_D += grad_dt_D
                grad_x_D = grad_drive_D * delta_D + dy_D * D_D
                mask = in_D & (t < length)
                tl.store(grad_x + row * d + channel_D, grad_x_D.to(grad_x.dtype.element_ty), mask=mask)
                tl.store(grad_dt + row * d + channel_D, grad_dt_D.to(grad_dt.dtype.element_ty), mask=mask)
                grad_B_N = tl.sum(g_DN * (delta_D * x_D)[:, None], 0)
                grad_C_N = tl.sum(h_U[u + 1] * dy_D[:, None], 0)
                # Only this program writes here; its first block finds nothing.
                offset_N = (group.to(tl.int64) * length * batch + row) * BLOCK_N + state_N
                others = (t < length) & (block > first_block) & (state_N >= 0)
                grad_B_N += tl.load(grad_B + offset_N, mask=others, other=0.0)
                grad_C_N += tl.load(grad_C + offset_N, mask=others, other=0.0)
                tl.store(grad_B + offset_N, grad_B_N, mask=(t < length) & (state_N >= 0))
                tl.store(grad_C + offset_N, grad_C_N, mask=(t < length) & (state_N >= 0))

        tl.store(grad_A + tile_row * BLOCK_N * d + offset_DN, grad_A_DN, mask=in_DN)
        tl.store(grad_D + tile_row * d + channel_D, grad_D_D, mask=in_D)
        tl.store(grad_bias + tile_row * d + channel_D, grad_bias_D, mask=in_D)
