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

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from archscale_megatron.ops.selective_scan_kernels import _backward_kernel, _carry_kernel, _forward_kernel

TILE = 32  # time steps between the states that are kept
WALK_STATES, WALK_UNROLL, WALK_WARPS = 512, 4, 1  # states of a program of the forward and carry kernels: 16 a thread
TILE_STATES, TILE_UNROLL, TILE_WARPS = 256, 4, 1  # of the backward kernel
BLOCKS_PER_PROGRAM = 16  # channel blocks whose share of dB and dC one program of the backward kernel adds up
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
    """y [s, b, d], and the states before each tile as fp32 [tiles, b, n', d], n' being n padded."""
    walk = _Walk(x, A)
    B, C = walk.padded(B), walk.padded(C)
    bias, starts = _fp32(dt_bias), _as_int8(starts)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    states = walk.empty(walk.tiles)
    inputs = (x, dt, walk.exponents(A), B, C, _fp32(D), bias, starts, y, states)
    strides = (x.stride(1), dt.stride(1))
    walk.run(_forward_kernel, inputs, strides, backwards=False)
    return y, states


def _scan_backward(dy, x, dt, A, B, C, D, dt_bias, starts, states) -> tuple[Tensor | None, ...]:
    """Gradients of x, dt, A, B, C, D and dt_bias."""
    (length, batch, d), n = x.shape, A.shape[1]
    walk = _Walk(x, A)
    B, C = walk.padded(B), walk.padded(C)
    bias, starts = _fp32(dt_bias), _as_int8(starts)
    exponents = walk.exponents(A)
    carries = walk.empty(walk.tiles)
    walk.run(_carry_kernel, (dy, dt, exponents, C, bias, starts, carries), (dy.stride(1), dt.stride(1)), backwards=True)

    block_d = max(1, TILE_STATES // walk.block_n)
    blocks = triton.cdiv(d, block_d)
    groups = triton.cdiv(blocks, BLOCKS_PER_PROGRAM)
    programs = walk.tiles * batch * groups
    new = states.new_empty
    tile_steps = new(programs, 2, TILE, block_d)
    tile_states = new(programs, TILE // TILE_UNROLL, block_d, walk.block_n)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    grad_dt = torch.empty_like(dt, memory_format=torch.contiguous_format)
    grad_A = torch.empty_like(states)
    grad_B, grad_C = (new(groups, length, batch, walk.block_n) for _ in range(2))
    grad_D, grad_bias = (new(walk.tiles, batch, d) for _ in range(2))
    _backward_kernel[walk.tiles, batch, groups](
        dy, x, dt, exponents, B, C, _fp32(D), bias, starts, states, carries, tile_steps, tile_states,
        grad_x, grad_dt, grad_A, grad_B, grad_C, grad_D, grad_bias,
        length, batch, d, dy.stride(1), x.stride(1), dt.stride(1),
        BLOCKS=BLOCKS_PER_PROGRAM, TILE=TILE, UNROLL=TILE_UNROLL, BLOCK_D=block_d, BLOCK_N=walk.block_n,
        EVEN_D=d % block_d == 0, num_warps=TILE_WARPS,
    )  # fmt: skip
    grad_A = grad_A.sum((0, 1))[:n].t()
    grad_B, grad_C = (v.sum(0)[..., :n] for v in (grad_B, grad_C))
    grad_D, grad_bias = (v.sum((0, 1)) for v in (grad_D, grad_bias))
    return grad_x, grad_dt, grad_A, grad_B, grad_C, grad_D, grad_bias


class _Walk:
    """How the forward and carry kernels walk through time."""

    def __init__(self, x: Tensor, A: Tensor) -> None:
        (length, self.batch, self.d), n = x.shape, A.shape[1]
        self.length, self.device = length, x.device
        self.block_n = triton.next_power_of_2(n)
        self.block_d = max(1, WALK_STATES // self.block_n)
        self.d_blocks = triton.cdiv(self.d, self.block_d)
        self.tiles = triton.cdiv(length, TILE)
        programs = self.d_blocks * self.batch
        chunks = 1 if programs >= FEW_PROGRAMS else triton.cdiv(MANY_PROGRAMS, programs)
        self.chunk_tiles = triton.cdiv(self.tiles, chunks)
        self.chunks = triton.cdiv(self.tiles, self.chunk_tiles)

    def padded(self, v: Tensor) -> Tensor:
        """B or C as fp32 [s, b, n'], dense: small beside the rest, and read again for every block of channels."""
        return F.pad(v.float(), (0, self.block_n - v.shape[-1])).contiguous()

    def exponents(self, A: Tensor) -> Tensor:
        """A log2(e), as fp32 [n', d]: the kernels compute exp(delta A) as a power of 2."""
        return F.pad(A.float().t() * 1.4426950408889634, (0, 0, 0, self.block_n - A.shape[1])).contiguous()

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(*shape, self.batch, self.block_n, self.d, dtype=torch.float32, device=self.device)

    def run(self, kernel, tensors: tuple, strides: tuple[int, int], backwards: bool) -> None:
        """Walk through all chunks; where each begins is found by a first pass, if there are several."""
        states, decays = self.empty(self.chunks), self.empty(self.chunks)
        sizes = (self.length, self.batch, self.d, *strides, self.chunk_tiles)
        blocks = {"TILE": TILE, "UNROLL": WALK_UNROLL, "BLOCK_D": self.block_d, "BLOCK_N": self.block_n}
        blocks |= {"EVEN_D": self.d % self.block_d == 0, "num_warps": WALK_WARPS}
        grid = (self.d_blocks, self.batch, self.chunks)
        if self.chunks > 1:
            kernel[grid](*tensors, states, decays, *sizes, OUTPUT=False, **blocks)
        order = range(self.chunks)
        state = torch.zeros_like(states[0])
        for k in reversed(order) if backwards else order:
            # what the chunk makes of the state, then the state it begins with
            after = torch.addcmul(states[k], decays[k], state) if self.chunks > 1 else state
            states[k] = state
            state = after
        kernel[grid](*tensors, states, decays, *sizes, OUTPUT=True, **blocks)


def _regular(v: Tensor) -> Tensor:
    """v [s, b, d], copied unless its rows are dense and equally far apart."""
    regular = v.stride(2) == 1 and v.stride(0) == v.shape[1] * v.stride(1)
    return v if regular else v.contiguous()


def _fp32(v: Tensor | None) -> Tensor | None:
    return None if v is None else v.float().contiguous()


def _as_int8(starts: Tensor | None) -> Tensor | None:
    return None if starts is None else starts.contiguous().view(torch.int8)
