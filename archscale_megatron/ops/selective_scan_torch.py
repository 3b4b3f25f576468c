"""Selective scan in plain torch, for CPUs.

A step is one in-place `addcmul` on a [b, n, d] state (d last, so that everything vectorises). Whatever does
not depend on the previous step is done for a whole chunk, in buffers that are reused and stay in cache. Only
the state before each chunk is kept for the backward pass, which recomputes the others.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# Steps of a chunk: enough to hide the cost of calling torch, few enough for the buffers to stay in cache.
CHUNK_SIZE = 32
# exp() of less is not a normal fp32 number, takes some 25 times as long, and is zero to any result.
MIN_EXPONENT = -87.0


def scan_forward(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The scan (see `selective_scan`), and what the backward pass needs.

    Args are those of `selective_scan`, but `delta` [s, b, d] is the step size itself (after softplus); the
    maths is in its dtype, which `A` and `D` share.

    Returns:
        y [s, b, d] in the dtype of x; states [chunks, b, n, d], the state before each chunk.
    """
    length, batch, d = x.shape
    A_ND = A.t().contiguous()
    chunks = range(0, length, CHUNK_SIZE)
    resets = _resets(starts, len(chunks))
    decay, h = (delta.new_empty(min(length, CHUNK_SIZE) + 1, batch, *A_ND.shape) for _ in range(2))
    decay_steps, h_steps = decay.unbind(), h.unbind()
    states = delta.new_empty(len(chunks), batch, *A_ND.shape)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)

    h[0].zero_()
    for k, first in enumerate(chunks):
        rows = slice(first, min(first + CHUNK_SIZE, length))
        size = rows.stop - first
        x_TBD, B_TBN, C_TBN = (v[rows].to(delta.dtype) for v in (x, B, C))
        states[k] = h[0]
        _fill(decay[:size], h[: size + 1], delta[rows], delta[rows] * x_TBD, A_ND, B_TBN, resets[k])
        _recur(h_steps[: size + 1], decay_steps[:size])
        y[rows] = (C_TBN.unsqueeze(2) @ h[1 : size + 1]).squeeze(2).addcmul_(x_TBD, D)
        h[0] = h[size]
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
    """Gradients of x, delta, A, B, C, D (each of its shape, in the dtype of delta), given that of y.

    With g_t = dL/dh_t and a_t = exp(delta_t A):  g_t = C_t dy_t + a_{t+1} g_{t+1}, and the gradient of the
    exponent delta_t A is g_t a_t h_{t-1}.
    """
    length, batch, d = x.shape
    A_ND = A.t().contiguous()
    chunks = range(0, length, CHUNK_SIZE)
    resets = _resets(starts, len(chunks))
    decay, h, g = (delta.new_empty(min(length, CHUNK_SIZE) + 1, batch, *A_ND.shape) for _ in range(3))
    decay_steps, h_steps, g_steps = decay.unbind(), h.unbind(), g.unbind()
    grad_x, grad_delta = torch.empty_like(delta), torch.empty_like(delta)
    grad_B, grad_C = (delta.new_empty(B.shape) for _ in range(2))
    grad_A = torch.zeros_like(g)  # summed over time and batch only at the end
    grad_D = torch.zeros_like(D)

    carry = torch.zeros_like(g[0])  # a_{t+1} g_{t+1} at the end of the chunk
    for k, first in reversed(list(enumerate(chunks))):
        rows = slice(first, min(first + CHUNK_SIZE, length))
        size = rows.stop - first
        delta_TBD = delta[rows]
        dy_TBD, x_TBD, B_TBN, C_TBN = (v[rows].to(delta.dtype) for v in (dy, x, B, C))
        drive = delta_TBD * x_TBD
        a_TBND, h_TBND, g_TBND = decay[:size], h[1 : size + 1], g[:size]
        h[0] = states[k]
        _fill(a_TBND, h[: size + 1], delta_TBD, drive, A_ND, B_TBN, resets[k])
        _recur(h_steps[: size + 1], decay_steps[:size])

        torch.mul(C_TBN.unsqueeze(3), dy_TBD.unsqueeze(2), out=g_TBND)
        g_TBND[-1] += carry
        _recur(g_steps[:size][::-1], decay_steps[1:size][::-1])

        grad_C[rows] = (dy_TBD.unsqueeze(2) @ h_TBND.mT).squeeze(2)
        grad_B[rows] = (drive.unsqueeze(2) @ g_TBND.mT).squeeze(2)
        grad_drive = (B_TBN.unsqueeze(2) @ g_TBND).squeeze(2)
        grad_exponent = a_TBND.mul_(g_TBND)
        carry.copy_(grad_exponent[0])
        grad_exponent.mul_(h[:size])
        grad_A[:size].addcmul_(grad_exponent, delta_TBD.unsqueeze(2))
        grad_delta[rows] = grad_exponent.mul_(A_ND).sum(2).addcmul_(grad_drive, x_TBD)
        grad_x[rows] = (grad_drive * delta_TBD).addcmul_(dy_TBD, D)
        grad_D += (dy_TBD * x_TBD).sum((0, 1))
    return grad_x, grad_delta, grad_A.sum((0, 1)).t(), grad_B, grad_C, grad_D


def _fill(
    a: Tensor, h: Tensor, delta: Tensor, drive: Tensor, A_ND: Tensor, B: Tensor, resets: list[tuple[int, int]]
) -> None:
    """Write a chunk's decays exp(delta A) into `a`, and into h[1:] what each step adds to the state."""
    torch.mul(delta.unsqueeze(2), A_ND, out=a).clamp_(min=MIN_EXPONENT).exp_()
    for t, i in resets:
        a[t, i].zero_()
    torch.mul(B.unsqueeze(3), drive.unsqueeze(2), out=h[1:])


def _recur(h: Sequence[Tensor], a: Sequence[Tensor]) -> None:
    """h_t += a_t h_{t-1} for all steps but the first, whose decays are `a`."""
    for previous, a_t, h_t in zip(h, a, h[1:], strict=False):
        h_t.addcmul_(a_t, previous)


def _resets(starts: Tensor | None, chunks: int) -> list[list[tuple[int, int]]]:
    """The document starts of each chunk, as (step within the chunk, batch index)."""
    resets: list[list[tuple[int, int]]] = [[] for _ in range(chunks)]
    for t, i in [] if starts is None else starts.nonzero().tolist():
        resets[t // CHUNK_SIZE].append((t % CHUNK_SIZE, i))
    return resets
