"""Tensors without data and process groups without peers, on which Megatron runs unchanged."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode


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
    coalesced collectives are done at once."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0.0 if args[0].is_floating_point() else 0
        if func.namespace == "c10d" and "coalesced" in func.overloadpacket.__name__:
            return FakeWork().boxed()
        return func(*args, **kwargs or {})


def _all_gather_object(gathered: list[Any], own: Any, group: Any = None) -> None:
    """All ranks have what this one has. Megatron gathers the optimizer's parameter groups."""
    gathered[:] = [own] * len(gathered)
