"""Forms of document starts, against what a person writes down."""

import weakref

import pytest
import torch

from archscale_megatron.ops.documents import (
    check_document_starts,
    cumulative_lengths,
    document_ids,
    document_ids_by_row,
    longest_document,
    starts_of_documents,
)


@pytest.mark.parametrize("first_marked", [True, False])
def test_boundaries_and_ids(first_marked: bool) -> None:
    starts = torch.tensor([[first_marked, 0, 1, 1, 0], [first_marked, 0, 0, 0, 1]], dtype=torch.bool).t()
    given = starts.clone()
    ends = cumulative_lengths(starts)
    assert ends.dtype == torch.int32 and ends.tolist() == [0, 2, 3, 5, 9, 10]
    ids = document_ids(starts)
    assert ids.dtype == torch.int32 and ids.t().tolist() == [[0, 0, 1, 2, 2], [0, 0, 0, 0, 1]]
    assert document_ids_by_row(starts).equal(ids.t()) and longest_document(starts) == 4
    assert torch.equal(starts, given)


@pytest.mark.parametrize("starts", [torch.zeros(4, 2), torch.zeros(2, 4, dtype=torch.bool)])
def test_wrong_starts_are_refused(starts: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"give torch.bool \[s, b\] = \[4, 2\]"):
        check_document_starts(starts, 4, 2)


def test_starts_of_documents() -> None:
    tokens = torch.tensor([[7, 2, 2, 5, 2], [2, 5, 5, 5, 5]])
    assert starts_of_documents(tokens, 2).t().tolist() == [[True, False, True, True, False], [True, True] + 3 * [False]]


def test_forms_are_computed_once_for_a_tensor_and_forgotten_with_it() -> None:
    starts = torch.zeros(5, 2, dtype=torch.bool)
    for form in (cumulative_lengths, document_ids, document_ids_by_row):
        assert form(starts) is form(starts)
        assert form(starts) is not form(starts.clone())  # which no layer gets: it would be computed again
    assert cumulative_lengths(starts, torch.int64).dtype == torch.int64
    assert cumulative_lengths(starts).dtype == torch.int32
    results = [weakref.ref(starts), weakref.ref(cumulative_lengths(starts)), weakref.ref(document_ids_by_row(starts))]
    del starts
    assert [result() for result in results] == [None] * 3
