"""The values on which shapes depend: which experts a token goes to, and where documents start.

Tokens go to the experts in turn, so that each gets tokens x top-k / experts of them, and each sequence is one document.
These are tensors with data; `fake.fake_tensors` computes with them as far as the shapes need it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from megatron.core.transformer.moe import token_dispatcher
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from archscale_megatron.layers.moe import Router
from archscale_megatron.training import step


@contextlib.contextmanager
def known_values() -> Iterator[None]:
    """Inside of `fake_tensors`."""
    route, gather = Router.routing, token_dispatcher.gather_from_sequence_parallel_region

    def routing(self: Router, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        weights, choices = route(self, logits, padding_mask)
        return weights, balanced_choices(len(choices), choices.shape[1], self.topk)

    def gather_known(x: Tensor, **options: Any) -> Tensor:
        gathered = gather(x, **options)
        if isinstance(x, FakeTensor):
            return gathered
        return x.repeat(len(gathered) // len(x), *[1] * (x.dim() - 1))  # all ranks have what this one has

    with (
        mock.patch.object(Router, "routing", routing),
        mock.patch.object(token_dispatcher, "gather_from_sequence_parallel_region", gather_known),
        mock.patch.object(token_dispatcher, "sort_chunks_by_idxs", _sort_chunks),
        mock.patch.object(step, "get_tokenizer", lambda: SimpleNamespace(eod=None)),
        mock.patch.object(step, "starts_of_documents", _one_document),
    ):
        yield


def balanced_choices(tokens: int, experts: int, top_k: int) -> Tensor:
    """bool [tokens, experts]: the first token has the first `top_k` experts, the second the next ones, and so on."""
    with unset_fake_temporarily():
        chosen = (torch.arange(tokens * top_k) % experts).view(tokens, top_k)
        return torch.zeros(tokens, experts, dtype=torch.bool).scatter(1, chosen, True)


def _sort_chunks(
    x: Tensor, sizes: Tensor, order: Tensor, probs: Tensor | None = None, fused: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Megatron's in any order: it has no effect on the result's size."""
    chunks = sizes.tolist()
    return torch.cat(x.split(chunks)), None if probs is None else torch.cat(probs.split(chunks))


def _one_document(tokens: Tensor, end_of_document: None) -> Tensor:
    with unset_fake_temporarily():
        starts = torch.zeros(tokens.shape[::-1], dtype=torch.bool)
        starts[0] = True
        return starts
