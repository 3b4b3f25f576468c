"""Selective scan in Triton, forward and backward, for any GPU.

Forward, a thread holds a channel's states in registers and walks through time, one step after the other, with
the rows of the next steps already on their way; it keeps the state before every tile of TILE steps for the
backward pass. Backward, the state's gradient walks from the last step to the first likewise, and is kept at the
end of every tile (the carry kernel). Then all tiles are independent, and one kernel makes all gradients: it
computes a tile's states again, and goes back through its steps.

Where there are too few channels to fill a GPU, time is cut into chunks: a first pass walks through all chunks
at once, each from a state of zero, and what it leaves gives the state at the start of each chunk.

Nothing is added atomically: partial sums are added up in a fixed order, so results repeat exactly.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from archscale_megatron.ops.selective_scan_tile import _scan_backward_kernel
from archscale_megatron.ops.selective_scan_walk import _scan_carry_kernel, _scan_forward_kernel

TILE = 32  # time steps between the states that are kept
WALK_STATES, WALK_UNROLL, WALK_WARPS = 512, 4, 1  # states of a program of the forward and carry kernels: 16 a thread
TILE_STATES, TILE_UNROLL, TILE_WARPS = 256, 4, 1  # of the backward kernel
TILE_REGISTERS = 168  # a thread: left alone, the compiler takes so many that only 8 warps fit on a multiprocessor
BLOCKS_PER_PROGRAM = 32  # channel blocks whose share of dB and dC one program of the backward kernel adds up
FEW_PROGRAMS, MANY_PROGRAMS = 256, 1024  # fewer walks than FEW are cut into chunks, so that they are about MANY


def scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor | None,
    starts: Tensor | None,
) -> Tensor:
    """The scan, see `selective_scan`."""
    return _Scan.apply(x, dt, A, B, C, D, dt_bias, starts)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, dt_bias, starts):
        x, dt = _regular(x), _regular(dt)
        y, states = _scan_forward(x, dt, A, B, C, D, dt_bias, starts)
        ctx.save_for_backward(x, dt, A, B, C, D, dt_bias, starts, states)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        inputs = ctx.saved_tensors
        grads = _scan_backward(_regular(dy), *inputs)
        return *(None if v is None else g.to(v.dtype) for g, v in zip(grads, inputs[:7], strict=True)), None


def _scan_forward(x, dt, A, B, C, D, dt_bias, starts) -> tuple[Tensor, Tensor]:
    """y [s, b, d], and the states before each tile as fp32 [tiles, b, d, n'], n' being n padded."""
    walk = _Walk(x, A)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    states = walk.empty(walk.tiles, walk.batch, walk.d, walk.block_n)
    walk.run(
        _scan_forward_kernel,
        (x, dt, walk.exponents(A), walk.rows(B), walk.rows(C), _fp32(D), _fp32(dt_bias), _as_int8(starts), y, states),
        (x.stride(1), dt.stride(1)),
    )
    return y, states


def _scan_backward(dy, x, dt, A, B, C, D, dt_bias, starts, states) -> tuple[Tensor, ...]:
    """Gradients of x, dt, A, B, C, D and dt_bias."""
    (length, batch, d), n = x.shape, A.shape[1]
    walk = _Walk(x, A)
    A, B, C = walk.exponents(A), walk.rows(B), walk.rows(C)
    bias, starts = _fp32(dt_bias), _as_int8(starts)
    carries = torch.empty_like(states)
    strides = (dy.stride(1), x.stride(1), dt.stride(1))
    walk.run(_scan_carry_kernel, (dy, dt, A, C, bias, starts, carries), strides[::2], backwards=True)

    block_d = max(1, TILE_STATES // walk.block_n)
    groups = triton.cdiv(triton.cdiv(d, block_d), BLOCKS_PER_PROGRAM)
    grid = (walk.tiles, batch, groups)
    limit = {} if TILE_REGISTERS is None or torch.version.hip else {"maxnreg": TILE_REGISTERS}
    scratch = walk.empty(*grid, 7 * TILE * block_d + TILE // TILE_UNROLL * block_d * walk.block_n)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    grad_dt = torch.empty_like(dt, memory_format=torch.contiguous_format)
    grad_A = torch.empty_like(states)
    grad_BC = walk.empty(groups, batch, walk.steps, 2, walk.block_n)
    grad_D, grad_bias = (walk.empty(walk.tiles, batch, d) for _ in range(2))
    _scan_backward_kernel[grid](
        dy, x, dt, A.t().contiguous(), B, C, _fp32(D), bias, starts, states, carries, scratch,
        grad_x, grad_dt, grad_A, grad_BC, grad_D, grad_bias,
        length, batch, d, *strides, walk.steps,
        BLOCKS=BLOCKS_PER_PROGRAM, TILE=TILE, UNROLL=TILE_UNROLL, BLOCK_D=block_d, BLOCK_N=walk.block_n,
        EVEN_D=d % block_d == 0, num_warps=TILE_WARPS, **limit,
    )  # fmt: skip
    grad_B, grad_C = grad_BC.sum(0)[:, :length, :, :n].permute(2, 1, 0, 3)
    return grad_x, grad_dt, grad_A.sum((0, 1))[:, :n], grad_B, grad_C, grad_D.sum((0, 1)), grad_bias.sum((0, 1))


class _Walk:
    """The sizes of a scan, and how the forward and carry kernels walk through it."""

    def __init__(self, x: Tensor, A: Tensor) -> None:
        (self.length, self.batch, self.d), n = x.shape, A.shape[1]
        self.device = x.device
        self.block_n = triton.next_power_of_2(n)
        self.block_d = max(1, WALK_STATES // self.block_n)
        self.d_blocks = triton.cdiv(self.d, self.block_d)
        self.tiles = triton.cdiv(self.length, TILE)
        self.steps = self.tiles * TILE + WALK_UNROLL  # rows of B and C: those loaded ahead may be past the end
        programs = self.d_blocks * self.batch
        chunks = 1 if programs >= FEW_PROGRAMS else triton.cdiv(MANY_PROGRAMS, programs)
        self.chunk_tiles = triton.cdiv(self.tiles, chunks)
        self.chunks = triton.cdiv(self.tiles, self.chunk_tiles)

    def rows(self, v: Tensor) -> Tensor:
        """B or C as fp32 [b, steps, n'], padded: small beside the rest, and read for every block of channels."""
        return F.pad(
            v.float().transpose(0, 1), (0, self.block_n - v.shape[2], 0, self.steps - self.length)
        ).contiguous()

    def exponents(self, A: Tensor) -> Tensor:
        """A log2(e), as fp32 [n', d]: the kernels compute exp(delta A) as a power of 2."""
        return F.pad(A.float().t() * math.log2(math.e), (0, 0, 0, self.block_n - A.shape[1])).contiguous()

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def run(
        self, kernel: Any, tensors: tuple[Tensor | None, ...], strides: tuple[int, ...], backwards: bool = False
    ) -> None:
        """Walk through all chunks; if there are several, a first pass finds the state that each begins with."""
        states, decays = (self.empty(self.chunks, self.batch, self.block_n, self.d) for _ in range(2))
        sizes = (self.length, self.batch, self.d, *strides, self.chunk_tiles, self.steps)
        blocks = {"TILE": TILE, "UNROLL": WALK_UNROLL, "BLOCK_D": self.block_d, "BLOCK_N": self.block_n}
        blocks |= {"EVEN_D": self.d % self.block_d == 0, "num_warps": WALK_WARPS}
        launch = kernel[self.d_blocks, self.batch, self.chunks]
        if self.chunks > 1:
            launch(*tensors, states, decays, *sizes, OUTPUT=False, **blocks)
        order = range(self.chunks)
        state = torch.zeros_like(states[0])
        for k in reversed(order) if backwards else order:
            after = torch.addcmul(states[k], decays[k], state) if self.chunks > 1 else state
            states[k] = state
            state = after
        launch(*tensors, states, decays, *sizes, OUTPUT=True, **blocks)


def _regular(v: Tensor) -> Tensor:
    """v [s, b, d], copied unless its rows are dense and equally far apart."""
    regular = v.stride(2) == 1 and v.stride(0) == v.shape[1] * v.stride(1)
    return v if regular else v.contiguous()


def _fp32(v: Tensor | None) -> Tensor | None:
    return None if v is None else v.float().contiguous()


def _as_int8(starts: Tensor | None) -> Tensor | None:
    return None if starts is None else starts.contiguous().view(torch.int8)
