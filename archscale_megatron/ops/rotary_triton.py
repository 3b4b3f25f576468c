"""Rotary position embedding in Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

PAIRS = 1024  # of one program: some heads of a token


def rotate(x: Tensor, cos: Tensor, sin: Tensor, y: Tensor, backward: bool) -> None:
    """x turned by the angles, or back, into y.

    Args:
        x: [s, b, heads, d], the channels of a head side by side.
        cos, sin: fp32 [s, 1, 1, d], contiguous.
        y: contiguous, like x.
    """
    s, b, heads, d = x.shape
    half = triton.next_power_of_2(d // 2)
    heads_block = max(1, min(PAIRS // half, triton.next_power_of_2(heads)))
    grid = (s * b, triton.cdiv(heads, heads_block))
    blocks = {"HEADS": heads_block, "HALF": half, "BACKWARD": backward}
    _rotate_kernel[grid](x, cos, sin, y, b, heads, d // 2, *x.stride()[:3], **blocks)


@triton.jit
def _rotate_kernel(
    x, cos, sin, y, batch, count, half, token_stride, batch_stride, head_stride,
    HEADS: tl.constexpr, HALF: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    token = row // batch
    head, pair = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, HALF)
    mask = (head < count)[:, None] & (pair < half)[None, :]
    source = x + token * token_stride + (row % batch) * batch_stride + head[:, None] * head_stride + pair[None, :]
    first = tl.load(source, mask=mask).to(tl.float32)
    second = tl.load(source + half, mask=mask).to(tl.float32)
    c = tl.load(cos + token * 2 * half + pair, mask=pair < half)[None, :]
    s = tl.load(sin + token * 2 * half + pair, mask=pair < half)[None, :]
    if BACKWARD:
        s = -s
    result = y + (row * count + head[:, None]) * 2 * half + pair[None, :]
    tl.store(result, (first * c - second * s).to(y.dtype.element_ty), mask=mask)
    tl.store(result + half, (second * c + first * s).to(y.dtype.element_ty), mask=mask)
