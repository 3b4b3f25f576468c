"""Where documents begin in a packed sequence: from its tokens, and in the forms that kernels ask for.

Everywhere here `document_starts` is bool [s, b], True at the first token of each document. Position 0 begins
a document whether it is marked or not.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


def starts_of_documents(tokens: Tensor, end_of_document: int) -> Tensor:
    """tokens [b, s] -> bool [s, b]: the first token, and each one behind an `end_of_document`."""
    return F.pad(tokens[:, :-1] == end_of_document, (1, 0), value=True).t().contiguous()


def check_document_starts(document_starts: Tensor, s: int, b: int) -> None:
    """Raise ValueError unless `document_starts` is bool [s, b]."""
    if document_starts.dtype != torch.bool or document_starts.shape != (s, b):
        raise ValueError(
            f"document_starts is {document_starts.dtype} {list(document_starts.shape)}; "
            f"give torch.bool [s, b] = [{s}, {b}]"
        )


def once_per_starts[Result](compute: Callable[..., Result]) -> Callable[..., Result]:
    """`compute` of document starts, and of what else is given, kept for as long as the tensor of starts is there: all
    layers of a forward pass, and their backward passes, have one result. So nobody may change starts in place."""
    results = WeakTensorKeyDictionary()

    @functools.wraps(compute)
    def once(document_starts: Tensor, *rest: Any) -> Result:
        known = results.setdefault(document_starts, {})
        if rest not in known:
            known[rest] = compute(document_starts, *rest)
        return known[rest]

    return once


@once_per_starts
def cumulative_lengths(document_starts: Tensor, dtype: torch.dtype = torch.int32) -> Tensor:
    """Document boundaries of the batch's rows laid end to end: [documents + 1], from 0 to b * s.

    On a GPU this waits for the device, as the number of documents is the size of the result.
    """
    starts = document_starts.t().clone()
    starts[:, 0] = True
    return F.pad(starts.flatten().nonzero().flatten(), (0, 1), value=starts.numel()).to(dtype)


@once_per_starts
def longest_document(document_starts: Tensor) -> int:
    """Tokens of the longest document, for which this waits as well."""
    return int(cumulative_lengths(document_starts).diff().max())


@once_per_starts
def document_ids(document_starts: Tensor) -> Tensor:
    """Number of the document that each token belongs to, from 0 in every row: int32 [s, b]."""
    ids = document_starts.cumsum(0, dtype=torch.int32)
    return ids - ids[:1]  # position 0 is document 0, marked or not


@once_per_starts
def document_ids_by_row(document_starts: Tensor) -> Tensor:
    """The same as contiguous int32 [b, s]."""
    return document_ids(document_starts).t().contiguous()
