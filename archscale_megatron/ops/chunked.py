"""Linear recurrences in chunks: matrix products within a chunk of steps, a state from one chunk to the next."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from archscale_megatron.ops.documents import document_ids
from archscale_megatron.ops.selective_scan_torch import MIN_EXPONENT


def scan_chunks(
    step: Callable[..., tuple[Tensor, Tensor]],
    state: Tensor,
    inputs: tuple[Tensor, ...],
    document_starts: Tensor | None,
    chunk_size: int,
) -> Tensor:
    """Run `step` over the chunks of a sequence.

    A chunk's matrices are made again in the backward pass: what is kept is the state before each chunk, so that
    memory is linear in the length of the sequence.

    Args:
        step: (state, ids, *chunks of the inputs) -> (output [q, b, ...], state); see `chunk_decay` for ids.
        state: before the first step, all zero.
        inputs: each [s, b, ...].
        document_starts: bool [s, b] or None.
        chunk_size: steps of a chunk; the last one may be shorter.

    Returns:
        [s, b, ...], the outputs.
    """
    chunks = zip(*(v.split(chunk_size) for v in inputs), strict=True)
    bounds = pairwise([*range(0, len(inputs[0]), chunk_size), len(inputs[0])])
    ids = None
    if document_starts is not None:
        ids = document_ids(document_starts)
        ids = torch.cat([ids[:1], ids])  # before the first step is a state of zeros: it may belong to any document
    outputs = []
    for chunk, (first, end) in zip(chunks, bounds, strict=True):
        chunk_ids = None if ids is None else ids[first : end + 1]
        output, state = checkpoint(step, state, chunk_ids, *chunk, use_reentrant=False, preserve_rng_state=False)
        outputs.append(output)
    return torch.cat(outputs)


def chunk_decay(log_decay: Tensor, ids: Tensor | None) -> Tensor:
    """What is left, after each step of a chunk, of the state before the chunk and of what each step added.

    Sums of logarithms are taken for every pair of steps: differences of running sums would lose the digits of a
    small sum beside a large one.

    Args:
        log_decay: [b, h, q], of the q steps; not positive.
        ids: int [q + 1, b], document of the step before the chunk and of each of its steps, or None for one.

    Returns:
        [b, h, q, q + 1]: in row t, column 0 is for the state, column 1 + j for step j; zero for j > t and across
        documents.
    """
    q = log_decay.shape[-1]
    ones = torch.ones(q, q + 1, dtype=torch.bool, device=log_decay.device)
    sums = log_decay.unsqueeze(-1).masked_fill(~ones.tril(), 0).cumsum(-2)
    reaches = ones.tril(1)
    if ids is not None:
        ids = ids.t()
        reaches = (reaches & (ids[:, 1:, None] == ids[:, None, :])).unsqueeze(1)
    return sums.clamp(min=MIN_EXPONENT).exp().masked_fill(~reaches, 0)
