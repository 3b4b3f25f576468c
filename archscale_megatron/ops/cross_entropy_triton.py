"""Cross entropy of logits in Triton: a pass over them forward, another backward, nothing added atomically.

A row is cut into vectors, as many logits as a thread loads at once. Each thread has a maximum and a sum of its own,
vector by vector, so that threads wait for one another once a row and not once a block of it.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

VECTOR_BYTES = 16  # at most
VECTORS = 1024  # of a row at a time: four in each thread of 8 warps
LOWEST = tl.constexpr(-3.4e38)  # below every logit, yet LOWEST - LOWEST is 0


def forward(
    logits: Tensor,
    labels: Tensor,
    first: int,
    vocab_size: int,
    label_smoothing: float,
    maximum: Tensor,
    normalizer: Tensor,
    taken: Tensor,
) -> None:
    """What the losses of these rows are made of, as far as it is in this rank's columns.

    Args:
        logits: [rows, v], the elements of a row side by side: columns `first` to `first` + v of the vocabulary.
        labels: int64 [rows], contiguous; of the whole vocabulary.
        vocab_size: entries without padding, over all ranks.
        label_smoothing: e below.
        maximum: fp32 [rows], of the logits.
        normalizer: fp32 [rows], the sum of exp(logit - maximum).
        taken: fp32 [rows], (1 - e) * the label's logit + e * the sum of the logits without padding / vocab_size.
    """
    vector = _vector(logits)
    _loss_forward_kernel[(len(logits),)](
        logits, labels, maximum, normalizer, taken,
        logits.shape[1] // vector, logits.stride(0) // vector, first, vocab_size - first,
        1 - label_smoothing, label_smoothing / vocab_size,
        SMOOTHED=label_smoothing > 0, VECTOR=vector, VECTORS=VECTORS, num_warps=8,
    )  # fmt: skip


def backward(
    grad: Tensor,
    logits: Tensor,
    labels: Tensor,
    first: int,
    vocab_size: int,
    label_smoothing: float,
    maximum: Tensor,
    normalizer: Tensor,
) -> None:
    """Write the gradient of the logits over them.

    Args:
        grad: fp32 [rows], contiguous; of the losses.
        maximum, normalizer: fp32 [rows], over all ranks. The others are those of `forward`.
    """
    vector = _vector(logits)
    vectors = logits.shape[1] // vector
    _loss_backward_kernel[(len(logits), triton.cdiv(vectors, VECTORS))](
        grad, logits, labels, maximum, normalizer,
        vectors, logits.stride(0) // vector, first, vocab_size - first,
        1 - label_smoothing, label_smoothing / vocab_size,
        SMOOTHED=label_smoothing > 0, VECTOR=vector, VECTORS=VECTORS, num_warps=8,
    )  # fmt: skip


def _vector(logits: Tensor) -> int:
    """Logits in a vector: a power of two that divides every row and the way to the next."""
    return math.gcd(VECTOR_BYTES // logits.element_size(), logits.shape[1], logits.stride(0))


@triton.jit
def _loss_forward_kernel(
    logits, labels, maximum, normalizer, taken,
    vectors, row_stride, first, local_vocab_size, label_weight, entry_weight,
    SMOOTHED: tl.constexpr, VECTOR: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride * VECTOR
    lane, element = tl.arange(0, VECTORS), tl.arange(0, VECTOR)
    highest = tl.full((VECTORS,), LOWEST, tl.float32)
    exponentials = tl.zeros((VECTORS,), tl.float32)
    total = tl.zeros((VECTORS,), tl.float32)
    for start in range(0, vectors, VECTORS):
        column = (start + lane)[:, None] * VECTOR + element[None, :]
        there = (start + lane < vectors)[:, None]
        x = tl.load(logits + column, mask=there, other=float("-inf")).to(tl.float32)
        previous, highest = highest, tl.maximum(highest, tl.max(x, 1))
        exponentials = exponentials * tl.exp(previous - highest) + tl.sum(tl.exp(x - highest[:, None]), 1)
        if SMOOTHED:
            total += tl.sum(tl.where(there & (column < local_vocab_size), x, 0.0), 1)
    row_maximum = tl.max(highest, 0)
    tl.store(maximum + row, row_maximum)
    tl.store(normalizer + row, tl.sum(exponentials * tl.exp(highest - row_maximum), 0))
    label = tl.load(labels + row) - first
    is_here = (label >= 0) & (label < vectors * VECTOR)
    from_label = label_weight * tl.load(logits + label, mask=is_here, other=0.0).to(tl.float32)
    tl.store(taken + row, from_label + entry_weight * tl.sum(total, 0))


@triton.jit
def _loss_backward_kernel(
    grad, logits, labels, maximum, normalizer,
    vectors, row_stride, first, local_vocab_size, label_weight, entry_weight,
    SMOOTHED: tl.constexpr, VECTOR: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride * VECTOR
    vector = tl.program_id(1) * VECTORS + tl.arange(0, VECTORS)
    column = vector[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    there = (vector < vectors)[:, None]
    x = tl.load(logits + column, mask=there, other=float("-inf")).to(tl.float32)
    dy = tl.load(grad + row)
    dx = tl.exp(x - tl.load(maximum + row)) * (dy / tl.load(normalizer + row))
    dx -= tl.where(column == tl.load(labels + row) - first, label_weight * dy, 0.0)
    if SMOOTHED:
        dx -= tl.where(column < local_vocab_size, entry_weight * dy, 0.0)
    tl.store(logits + column, dx.to(logits.dtype.element_ty), mask=there)
