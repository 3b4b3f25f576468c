"""Causal attention: full or sliding window, grouped heads, packed documents, memory linear in length."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from archscale_megatron.ops.documents import check_document_starts, cumulative_lengths, once_per_starts
from archscale_megatron.ops.flash_attention import flash_attention, flash_serves


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    softmax_scale: float,
    window: int | None = None,
    document_starts: Tensor | None = None,
    dropout_p: float = 0.0,
    sink: Tensor | None = None,
) -> Tensor:
    """softmax(softmax_scale * Q K^T) V over the tokens that each token may see: itself and those before it.

    Flash kernels compute it for fp16 and bf16 on a GPU (`ops.flash_attention`), torch's scaled_dot_product_attention
    elsewhere. No [s, s] matrix is made, with one exception: torch has no fused kernel for dropout on a CPU,
    so full attention with `dropout_p` > 0 keeps its probabilities there.

    Args:
        query: [s, b, n_q, d].
        key: [s, b, n_kv, d]; query head i reads head i // (n_q // n_kv).
        value: [s, b, n_kv, d_v]; d_v need not be d (differential attention has d_v = 2 d).
        softmax_scale: factor of the logits.
        window: number of tokens seen, the own one included; None for all.
        document_starts: bool [s, b], True at a document's first token: no token sees beyond its document.
        dropout_p: probability with which an attention weight is dropped.
        sink: [n_q], logits of something without a value that every token sees too: its exponential is a further term
            of the softmax's denominator (arXiv 2309.17453). Not with a window.

    Returns:
        [s, b, n_q, d_v] in the dtype of query.

    Raises:
        ValueError: shapes that do not fit, a window below 1 or beside a sink, or document_starts that is not bool
            [s, b].
    """
    _check_arguments(query, key, value, window, document_starts)
    if sink is not None:
        if window is not None or sink.shape != query.shape[2:3]:
            raise ValueError(
                f"sink {list(sink.shape)}, window {window}: give one logit for each of the {query.shape[2]} query "
                "heads, and no window"
            )
        return _with_sink(query, key, value, sink, softmax_scale, document_starts, dropout_p)
    # Fused kernels want equal head dimensions. Zeros add nothing to a logit, and give columns to cut off.
    d_v = value.shape[-1]
    head_dim = max(query.shape[-1], d_v)
    attend = _torch
    if flash_serves(query, head_dim):
        attend, head_dim = flash_attention, head_dim + -head_dim % 8
    query, key, value = (_widen(x, head_dim) for x in (query, key, value))
    return attend(query, key, value, softmax_scale, window, document_starts, dropout_p)[..., :d_v]


def _with_sink(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sink: Tensor,
    softmax_scale: float,
    document_starts: Tensor | None,
    dropout_p: float,
) -> Tensor:
    """Attention with one more token before each document, of value 0. One more channel makes its logit the sink's: it
    holds the sink in the queries, 1 in that token's key, and 0 in all others. No kernel needs to know."""
    s, b, _, d = query.shape
    channel = (sink / softmax_scale).to(query.dtype)[:, None].expand(s, b, -1, 1)
    query, key = torch.cat([query, channel], -1), F.pad(key, (0, 1))
    options: dict[str, Any] = {"softmax_scale": softmax_scale, "dropout_p": dropout_p}
    if document_starts is None:
        query, key, value = (F.pad(x, (0, 0, 0, 0, 0, 0, 1, 0)) for x in (query, key, value))
        key[0, ..., d] = 1
        return attention(query, key, value, **options)[1:]
    places, sinks, starts = _room_for_sinks(document_starts)
    query, key, value = (
        x.new_zeros(len(starts), 1, *x.shape[2:]).index_copy(0, places, x.transpose(0, 1).flatten(0, 1).unsqueeze(1))
        for x in (query, key, value)
    )
    key[sinks, ..., d] = 1
    out = attention(query, key, value, document_starts=starts, **options)
    return out[places, 0].unflatten(0, (b, s)).transpose(0, 1)


@once_per_starts
def _room_for_sinks(document_starts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The places of the tokens, all rows in one, when a sink stands before each document: int64 [s b]; those of the
    sinks: int64 [documents]; and where documents start then: bool [s b + documents, 1]."""
    starts = document_starts.t().clone()
    starts[:, 0] = True
    starts = starts.flatten()
    places = torch.arange(len(starts), device=starts.device) + starts.cumsum(0)
    sinks = places[starts] - 1
    starts = torch.zeros(len(starts) + len(sinks), 1, dtype=torch.bool, device=starts.device)
    return places, sinks, starts.index_fill(0, sinks, True)


def _check_arguments(
    query: Tensor, key: Tensor, value: Tensor, window: int | None, document_starts: Tensor | None
) -> None:
    shapes = f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"
    if not query.dim() == key.dim() == value.dim() == 4:
        raise ValueError(f"{shapes}: give [s, b, heads, head_dim] for each")
    s, b, n_q, d = query.shape
    n_kv = key.shape[2]
    if key.shape != (s, b, n_kv, d) or value.shape[:3] != key.shape[:3] or n_kv == 0 or n_q % n_kv:
        raise ValueError(
            f"{shapes}: give query [s, b, n_q, d], key [s, b, n_kv, d], value [s, b, n_kv, d_v], n_q a multiple of n_kv"
        )
    if window is not None and window < 1:
        raise ValueError(f"window {window}: give the number of tokens seen, own one included, at least 1, or None")
    if document_starts is not None:
        check_document_starts(document_starts, s, b)


def _widen(x: Tensor, head_dim: int) -> Tensor:
    missing = head_dim - x.shape[-1]
    return F.pad(x, (0, missing)) if missing else x


def _torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    softmax_scale: float,
    window: int | None,
    document_starts: Tensor | None,
    dropout_p: float,
) -> Tensor:
    options = {"scale": softmax_scale, "dropout_p": dropout_p}
    if document_starts is None:
        return _one_document(query, key, value, window, options)
    s, b = query.shape[:2]
    lengths = cumulative_lengths(document_starts).diff().tolist()
    # One split of the whole batch, so that the backward pass is one concatenation, not a sum over documents.
    documents = zip(
        *(x.transpose(0, 1).flatten(0, 1).unsqueeze(1).split(lengths) for x in (query, key, value)),
        strict=True,
    )
    outputs = torch.cat([_one_document(q, k, v, window, options) for q, k, v in documents])
    return outputs.squeeze(1).unflatten(0, (b, s)).transpose(0, 1)


def _one_document(query: Tensor, key: Tensor, value: Tensor, window: int | None, options: dict[str, float]) -> Tensor:
    s, b, n_q, _ = query.shape
    if window is None or window >= s:
        return _full(query, key, value, options)
    # The first `window` tokens see all that precedes them. Each later one sees exactly `window` tokens, so
    # every block of later ones sees a run of keys through the same small mask.
    head = _full(query[:window], key[:window], value[:window], options)
    # Smaller blocks compute less in vain, larger ones fill the kernel: half a window does well at 128 and 512.
    block = min(max(64, window // 2), s - window)
    run = window - 1 + block
    missing = -(s - window) % block  # the last block's padding follows all real tokens: they do not see it
    query, key, value = (
        F.pad(x, (0, 0, 0, 0, 0, 0, 0, missing)) if missing else x for x in (query[window:], key[1:], value[1:])
    )
    mask = torch.ones(block, run, dtype=torch.bool, device=query.device).triu().tril(window - 1)
    tail = _sdpa(
        _runs(query, block, block),
        _runs(key, run, block),
        _runs(value, run, block),
        attn_mask=mask,
        **options,
    )
    tail = tail.transpose(1, 2).flatten(0, 1).unflatten(1, (b, n_q))
    return torch.cat([head, tail[: s - window]])


def _full(query: Tensor, key: Tensor, value: Tensor, options: dict[str, float]) -> Tensor:
    query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    return _sdpa(query, key, value, is_causal=True, **options).permute(2, 0, 1, 3)


def _runs(x: Tensor, length: int, step: int) -> Tensor:
    """Overlapping runs of tokens [runs, b * heads, length, head_dim], as a view of x [s, b, heads, head_dim].

    Batch rows become heads, which keeps the grouping: query head i of row r is r n_q + i, and its key head
    r n_kv + i // group is (r n_q + i) // group.
    """
    return x.flatten(1, 2).unfold(0, length, step).transpose(2, 3)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """scaled_dot_product_attention of [batch, heads, tokens, head_dim], each key head serving a group."""
    group = query.shape[1] // key.shape[1]
    on_cpu = query.device.type == "cpu"
    if group > 1 and not on_cpu:  # not every fused GPU kernel takes groups
        key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, enable_gqa=on_cpu, **options)
