"""The Triton kernel of the selective scan's gradients; `selective_scan_triton` says how the kernels work together."""
# mypy: ignore-errors
# Triton's language is not quite Python's: tuples grow in loops that the compiler unrolls.

import triton
import triton.language as tl

from archscale_megatron.ops.selective_scan_walk import HUGE, _softplus


@triton.jit
def _scan_backward_kernel(
    dy, x, dt, A, B, C, D, dt_bias, starts, states, carries, scratch,
    grad_x, grad_dt, grad_A, grad_BC, grad_D, grad_bias,
    length, batch, d, dy_stride, x_stride, dt_stride, steps,
    BLOCKS: tl.constexpr, TILE: tl.constexpr, UNROLL: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN_D: tl.constexpr,
):  # fmt: skip
    """All gradients from one tile of time, for BLOCKS x BLOCK_D channels of one batch element.

    A program's scratch holds fp32 [7, TILE, BLOCK_D] of what belongs to a step and channel, and the state before
    every UNROLL steps. What the threads that share a channel would all compute is so computed once, and the loops
    over the steps find it at fixed distances.
    """
    PART: tl.constexpr = 8  # steps of which all channels are treated at once
    tile, i, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tile_row = (tile * batch + i).to(tl.int64)
    state_N, block_D = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    step_T, step_U = tl.arange(0, PART), tl.arange(0, UNROLL)
    block_DN = block_D[:, None] * BLOCK_N + state_N[None, :]
    block_TD = step_T[:, None] * BLOCK_D + block_D[None, :]
    # The layout of two of them has time last. The compiler may assume no alignment: each thread gets single steps.
    sum_DU = block_D[:, None] * TILE + tl.multiple_of(step_U, 1)[None, :]
    sum_TD = step_T[:, None] + block_D[None, :] * TILE
    PLANE: tl.constexpr = TILE * BLOCK_D
    GROUPS: tl.constexpr = TILE // UNROLL
    program = ((group * batch + i) * tl.num_programs(0) + tile).to(tl.int64)
    scratch += program * (7 * PLANE + GROUPS * BLOCK_D * BLOCK_N)
    exponents, drives, dys, deltas = scratch, scratch + PLANE, scratch + 2 * PLANE, scratch + 3 * PLANE
    slopes, drive_sums, exponent_sums = scratch + 4 * PLANE, scratch + 5 * PLANE, scratch + 6 * PLANE
    tile_states = scratch + 7 * PLANE

    row = i.to(tl.int64) * steps + tile * TILE
    B += row * BLOCK_N + state_N
    C += row * BLOCK_N + state_N
    # A row for each step's dB, and one for its dC
    row_W = tl.arange(0, 2 * UNROLL)
    row += (group * batch).to(tl.int64) * steps
    grad_BC_WN = grad_BC + row * 2 * BLOCK_N + row_W[:, None] * BLOCK_N + state_N[None, :]

    first_block = group * BLOCKS
    for block in range(first_block, tl.minimum(first_block + BLOCKS, tl.cdiv(d, BLOCK_D))):
        channel_D = block * BLOCK_D + block_D
        in_D = (channel_D < d) | EVEN_D
        # A thread loads 4 neighbours of every type, as many as of fp32.
        column_D = tl.multiple_of(channel_D, BLOCK_D if BLOCK_D < 4 else 4)
        for first in range(0, TILE, PART):
            in_T = tile * TILE + first + step_T < length
            in_TD = in_T[:, None] & in_D[None, :]
            row_T = (tile * TILE + first + step_T).to(tl.int64) * batch + i
            x_TD = tl.load(x + row_T[:, None] * x_stride + column_D[None, :], mask=in_TD, other=0.0).to(tl.float32)
            dy_TD = tl.load(dy + row_T[:, None] * dy_stride + column_D[None, :], mask=in_TD, other=0.0).to(tl.float32)
            z_TD = tl.load(dt + row_T[:, None] * dt_stride + column_D[None, :], mask=in_TD, other=0.0).to(tl.float32)
            if dt_bias is not None:
                z_TD += tl.load(dt_bias + channel_D, mask=in_D, other=0.0)[None, :]
            delta_TD, slope_TD = _softplus(z_TD)
            exponent_TD = delta_TD
            if starts is not None:
                start_T = tl.load(starts + row_T, mask=in_T, other=0)
                exponent_TD = tl.where(start_T[:, None] != 0, HUGE, delta_TD)
            part_TD = first * BLOCK_D + block_TD
            tl.store(exponents + part_TD, exponent_TD)
            tl.store(drives + part_TD, delta_TD * x_TD)
            tl.store(dys + part_TD, dy_TD)
            tl.store(deltas + part_TD, delta_TD)
            tl.store(slopes + part_TD, slope_TD)
        tl.debug_barrier()

        in_DN = in_D[:, None] & (state_N[None, :] >= 0)
        offset_DN = channel_D[:, None] * BLOCK_N + state_N[None, :]
        A_DN = tl.load(A + offset_DN, mask=in_DN, other=0.0)
        h_DN = tl.load(states + tile_row * d * BLOCK_N + offset_DN, mask=in_DN, other=0.0)
        carry_DN = tl.load(carries + tile_row * d * BLOCK_N + offset_DN, mask=in_DN, other=0.0)
        grad_A_DN = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)

        for k in range(GROUPS - 1):
            tl.store(tile_states + k * BLOCK_D * BLOCK_N + block_DN, h_DN)
            for u in tl.static_range(UNROLL):
                t = k * UNROLL + u
                exponent_D = tl.load(exponents + t * BLOCK_D + block_D)
                drive_D = tl.load(drives + t * BLOCK_D + block_D)
                h_DN = tl.exp2(exponent_D[:, None] * A_DN) * h_DN + drive_D[:, None] * tl.load(B + t * BLOCK_N)[None, :]
        tl.debug_barrier()

        for k in range(GROUPS):
            first = TILE - UNROLL - k * UNROLL
            h_U, a_U, exponent_U, drive_U, dy_U, B_U, C_U = (h_DN,), (), (), (), (), (), ()
            for u in tl.static_range(UNROLL):
                t = first + u
                exponent_U = exponent_U + (tl.load(exponents + t * BLOCK_D + block_D),)
                drive_U = drive_U + (tl.load(drives + t * BLOCK_D + block_D),)
                dy_U = dy_U + (tl.load(dys + t * BLOCK_D + block_D),)
                B_U = B_U + (tl.load(B + t * BLOCK_N),)
                C_U = C_U + (tl.load(C + t * BLOCK_N),)
                a_U = a_U + (tl.exp2(exponent_U[u][:, None] * A_DN),)
                h_U = h_U + (a_U[u] * h_U[u] + drive_U[u][:, None] * B_U[u][None, :],)
            h_DN = tl.load(tile_states + tl.maximum(GROUPS - 2 - k, 0) * BLOCK_D * BLOCK_N + block_DN)
            # Only this program writes here; its first block finds nothing.
            found = (block > first_block) & (row_W[:, None] >= 0) & (state_N[None, :] >= 0)
            grad_WN = tl.load(grad_BC_WN + first * 2 * BLOCK_N, mask=found, other=0.0)
            sums_WN = tl.zeros((2 * UNROLL, BLOCK_N), tl.float32)
            drive_sums_DU = tl.zeros((BLOCK_D, UNROLL), tl.float32)
            exponent_sums_DU = tl.zeros((BLOCK_D, UNROLL), tl.float32)
            for u in tl.static_range(UNROLL - 1, -1, -1):
                g_DN = dy_U[u][:, None] * C_U[u][None, :] + carry_DN
                carry_DN = a_U[u] * g_DN
                grad_exponent_DN = carry_DN * h_U[u]
                # exponents are huge only where this is 0
                grad_A_DN += grad_exponent_DN * exponent_U[u][:, None]
                drive_sum_D = tl.sum(g_DN * B_U[u][None, :], 1)
                exponent_sum_D = tl.sum(grad_exponent_DN * A_DN, 1)
                grad_B_N = tl.sum(g_DN * drive_U[u][:, None], 0)
                grad_C_N = tl.sum(h_U[u + 1] * dy_U[u][:, None], 0)
                drive_sums_DU = tl.where(step_U[None, :] == u, drive_sum_D[:, None], drive_sums_DU)
                exponent_sums_DU = tl.where(step_U[None, :] == u, exponent_sum_D[:, None], exponent_sums_DU)
                sums_WN = tl.where(row_W[:, None] == 2 * u, grad_B_N[None, :], sums_WN)
                sums_WN = tl.where(row_W[:, None] == 2 * u + 1, grad_C_N[None, :], sums_WN)
            tl.store(drive_sums + sum_DU + first, drive_sums_DU)
            tl.store(exponent_sums + sum_DU + first, exponent_sums_DU)
            tl.store(grad_BC_WN + first * 2 * BLOCK_N, grad_WN + sums_WN)
        tl.store(grad_A + tile_row * d * BLOCK_N + offset_DN, grad_A_DN, mask=in_DN)
        tl.debug_barrier()

        D_D = tl.load(D + channel_D, mask=in_D, other=0.0)
        grad_D_TD = tl.zeros((PART, BLOCK_D), tl.float32)
        grad_bias_TD = tl.zeros((PART, BLOCK_D), tl.float32)
        for first in range(0, TILE, PART):
            in_TD = (tile * TILE + first + step_T < length)[:, None] & in_D[None, :]
            row_T = (tile * TILE + first + step_T).to(tl.int64) * batch + i
            part_TD = first * BLOCK_D + block_TD
            x_TD = tl.load(x + row_T[:, None] * x_stride + column_D[None, :], mask=in_TD, other=0.0).to(tl.float32)
            dy_TD = tl.load(dys + part_TD)
            drive_sum_TD = tl.load(drive_sums + first + sum_TD)
            grad_x_TD = drive_sum_TD * tl.load(deltas + part_TD) + dy_TD * D_D[None, :]
            # A has a factor log2(e)
            exponent_sum_TD = tl.load(exponent_sums + first + sum_TD) * 0.6931471805599453
            grad_dt_TD = (exponent_sum_TD + drive_sum_TD * x_TD) * tl.load(slopes + part_TD)
            offset_TD = row_T[:, None] * d + column_D[None, :]
            tl.store(grad_x + offset_TD, grad_x_TD.to(grad_x.dtype.element_ty), mask=in_TD)
            tl.store(grad_dt + offset_TD, grad_dt_TD.to(grad_dt.dtype.element_ty), mask=in_TD)
            grad_D_TD += dy_TD * x_TD
            grad_bias_TD += tl.where(in_TD, grad_dt_TD, 0.0)
        tl.store(grad_D + tile_row * d + channel_D, tl.sum(grad_D_TD, 0), mask=in_D)
        tl.store(grad_bias + tile_row * d + channel_D, tl.sum(grad_bias_TD, 0), mask=in_D)
        tl.debug_barrier()  # before the next block's steps take the place of these
