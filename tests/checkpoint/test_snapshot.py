"""snapshot.py: what an asynchronous save holds while training goes on."""

from __future__ import annotations

import io

import pytest
import torch
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

from archscale_megatron.checkpoint import snapshot


@pytest.fixture(autouse=True)
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "_free", [])


def request_of(*tensors: torch.Tensor) -> AsyncRequest:
    """As Megatron makes it, of one file."""
    buckets = [("path", "name", ([("item", io.BytesIO())], [(f"item {i}", t) for i, t in enumerate(tensors)]))]
    return AsyncRequest(lambda rank, buckets, results: results.extend(buckets), [0, buckets, []], [], preload_fn=list)


def held(request: AsyncRequest) -> list[torch.Tensor]:
    """What the worker would write."""
    assert request.preload_fn is None  # nothing of a GPU
    (written,) = request.async_fn_args
    written.clear()
    request.async_fn(written)
    ((path, name, (data, tensors)),) = written
    assert (path, name, len(data)) == ("path", "name", 1)
    assert [item for item, _ in tensors] == [f"item {i}" for i in range(len(tensors))]
    return [tensor for _, tensor in tensors]


TENSORS = [
    torch.arange(24.0).view(4, 6)[1:3],
    torch.arange(24.0).view(4, 6).t(),
    torch.randn(3, 5).bfloat16(),
    torch.tensor(7),
    torch.empty(0, 3),
    torch.ones(2, requires_grad=True),
]


@pytest.mark.parametrize("tensor", TENSORS)
def test_own_storage(tensor: torch.Tensor) -> None:
    own = snapshot.with_own_storage(tensor)
    assert torch.equal(own, tensor) and own.dtype == tensor.dtype and own.shape == tensor.shape
    assert own.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    assert own.data_ptr() == tensor.data_ptr() or not tensor.is_contiguous()


def test_a_snapshot_is_of_its_time_and_its_memory_is_kept() -> None:
    tensors = [tensor.detach().clone() for tensor in TENSORS]
    saved = [tensor.clone() for tensor in tensors]
    first = snapshot.take(request_of(*tensors, tensors[0]))
    for tensor in tensors:
        tensor.add_(1)
    second = snapshot.take(request_of(*tensors))  # before the first is written
    for tensor in tensors:
        tensor.zero_()
    for found, expected in zip(held(first), [*saved, saved[0]], strict=True):
        assert torch.equal(found, expected) and found.untyped_storage().nbytes() == expected.nbytes
    for found, expected in zip(held(second), saved, strict=True):
        assert torch.equal(found, expected + 1)

    pointers = [held(request)[0].data_ptr() for request in (first, second)]
    assert pointers[0] != pointers[1]
    assert held(first)[0].data_ptr() == held(first)[-1].data_ptr()  # a tensor that is saved twice is copied once
    first.finalize_fns[0]()  # the first is written
    third = snapshot.take(request_of(*tensors))
    assert held(third)[0].data_ptr() == pointers[0]
    assert torch.equal(held(second)[0], saved[0] + 1)
    assert held(snapshot.take(request_of(torch.ones(10_000))))[0].sum() == 10_000


def test_requests_without_tensors_pass() -> None:
    request = AsyncRequest(print, [], [])
    assert snapshot.take(request) is request
