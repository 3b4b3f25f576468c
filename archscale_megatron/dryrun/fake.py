"""Tensors without data and process groups without peers, on which Megatron runs unchanged."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@contextlib.contextmanager
def fake_tensors() -> Iterator[None]:
    """New tensors have a shape, a dtype and a storage on the meta device. The default process group must be torch's
    `fake` one (Megatron's --fake-process-group)."""
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        _WithoutData(),
        # Parameters are made in their dtype. torch would swap each for another, which fake ones do not allow.
        mock.patch.multiple(torch.nn.Module, bfloat16=lambda self: self, half=lambda self: self),
        mock.patch.object(torch.distributed, "all_gather_object", _all_gather_object),
    ):
        yield


class _WithoutData(TorchDispatchMode):
    """Answers what fake tensors cannot: any number that the program asks for (does a loss scale overflow?) is 0, and
    coalesced collectives are done at once. What is made of tensors with data alone has data too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if tensors and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            with unset_fake_temporarily():
                return func(*args, **kwargs or {})
        mask = _mask(func, args)
        if mask is not None and not isinstance(mask, FakeTensor):
            with unset_fake_temporarily():
                selected = int(mask.sum())
            return args[0].new_empty(selected)
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0.0 if args[0].is_floating_point() else 0
        if func.namespace == "c10d" and "coalesced" in func.overloadpacket.__name__:
            return FakeWork().boxed()
        return func(*args, **kwargs or {})


def _mask(func: Any, args: Any) -> Tensor | None:
    """The bool tensor that says which elements of one as large are selected."""
    if func is torch.ops.aten.masked_select.default:
        return args[1]
    if func is torch.ops.aten.index.Tensor and len(args[1]) == 1 and args[1][0].shape == args[0].shape:
        return args[1][0] if args[1][0].dtype == torch.bool else None
    return None


def _all_gather_object(gathered: list[Any], own: Any, group: Any = None) -> None:
    """All ranks have what this one has. Megatron gathers the optimizer's parameter groups."""
    gathered[:] = [own] * len(gathered)
