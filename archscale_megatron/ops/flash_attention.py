"""Causal attention by the flash kernels of a GPU, for fp16 and bf16: cuDNN's, flash-attn's, or torch's copy of it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from archscale_megatron.ops.documents import cumulative_lengths, longest_document
from archscale_megatron.ops.packages import aligned, optional

# cuDNN compiles a kernel for each shape that it meets. Sequences of training are multiples of this many tokens, and few
# of the texts of all lengths in an evaluation are.
CUDNN_TOKENS = 128


def flash_serves(query: Tensor, head_dim: int) -> bool:
    """Whether `flash_attention` can serve these queries, heads widened to `head_dim`, a multiple of 8."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    return query.is_cuda and half and head_dim <= 256 and torch.cuda.get_device_capability(query.device) >= (8, 0)


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    softmax_scale: float,
    window: int | None,
    document_starts: Tensor | None,
    dropout_p: float,
) -> Tensor:
    """As `ops.attention.attention`, for equal head dimensions, multiples of 8, at most 256.

    Whole sequences of one document go to cuDNN where it has a kernel for them. No kernel is given repeated heads, and
    nothing is copied but rows of several documents, where the batch has more than one row, and heads out of place in
    memory.
    """
    s, b = query.shape[:2]
    query, key, value = (aligned(x) for x in (query, key, value))
    if window is not None and window >= s:
        window = None
    if window is None and document_starts is None and not dropout_p and s % CUDNN_TOKENS == 0:
        return _cudnn(query, key, value, softmax_scale)
    flash = _torch_flash if optional("flash_attn") is None else _package_flash
    if document_starts is None:
        # Batch rows become heads, as a view: query head i of row r is r n_q + i, and its key head r n_kv + i // group
        # is (r n_q + i) // group. The output and its gradient are then contiguous, as the backward kernel needs them.
        query, key, value = (x.flatten(1, 2).unsqueeze(0) for x in (query, key, value))
        return flash(query, key, value, softmax_scale, window, dropout_p).squeeze(0).unflatten(1, (b, -1))
    # The rows of the batch end to end.
    ends, longest = cumulative_lengths(document_starts), longest_document(document_starts)
    query, key, value = (x.transpose(0, 1).flatten(0, 1) for x in (query, key, value))
    out = flash(query, key, value, softmax_scale, window, dropout_p, ends, longest)
    return out.unflatten(0, (b, s)).transpose(0, 1)


def _cudnn(query: Tensor, key: Tensor, value: Tensor, softmax_scale: float) -> Tensor:
    """All by cuDNN, or by flash where it has no kernel. cuDNN's output has the layout of the query."""
    query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=softmax_scale, enable_gqa=True)
    return out.permute(2, 0, 1, 3)


def _torch_flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    softmax_scale: float,
    window: int | None,
    dropout_p: float,
    ends: Tensor | None = None,
    longest: int = 0,
) -> Tensor:
    """[b, s, heads, head_dim]; or, with the documents' `ends`, int32 [documents + 1], [tokens, heads, head_dim] of
    documents no longer than `longest`. Torch has the gradient of this operation."""
    s = query.shape[1] if ends is None else longest
    return torch.ops.aten._flash_attention_forward.default(
        query, key, value, ends, ends, s, s, dropout_p,
        True,  # is_causal, which with a window means nothing but the right side below
        False,  # no debug mask
        scale=softmax_scale,
        window_size_left=-1 if window is None else window - 1,
        window_size_right=0,
    )[0]  # fmt: skip


def _package_flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    softmax_scale: float,
    window: int | None,
    dropout_p: float,
    ends: Tensor | None = None,
    longest: int = 0,
) -> Tensor:
    """As `_torch_flash`, by flash-attn."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    options: dict[str, Any] = {
        "dropout_p": dropout_p,
        "softmax_scale": softmax_scale,
        "causal": True,
        "window_size": (-1, -1) if window is None else (window - 1, 0),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    if ends is None:
        return flash_attn_func(query, key, value, **options)
    return flash_attn_varlen_func(query, key, value, ends, ends, longest, longest, **options)
