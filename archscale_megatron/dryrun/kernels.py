"""What the fused kernels of a GPU keep for the backward pass, without computing anything: stand-ins for the ops.

A dry run counts the memory of the kernels that train on a GPU (the extra `gpu`), not of the torch code that
replaces them on a CPU. Each stand-in makes the tensors that its kernel makes, of the same shapes and dtypes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from archscale_megatron.ops import attention, causal_conv, fused, selective_scan
from archscale_megatron.ops.documents import document_ids_by_row
from archscale_megatron.ops.packages import optional


@contextlib.contextmanager
def fused_kernels() -> Iterator[None]:
    """Flash attention, causal-conv1d and our Triton kernels in the place of the ops' torch code: the first two for bf16
    and fp16 tensors."""
    with (
        mock.patch.object(fused, "kernels", lambda name, *tensors: _NoKernels()),
        _instead(attention, "_torch", _flash_attention),
        _instead(causal_conv, "_torch", _causal_conv1d),
        mock.patch.object(selective_scan, "_usable_backends", lambda x, with_starts: ["triton"]),
        contextlib.ExitStack() as scan,
    ):
        if optional("triton"):  # without it, a dry run has no Mamba-1
            for name in ("_scan_forward_kernel", "_scan_carry_kernel", "_scan_backward_kernel"):
                scan.enter_context(mock.patch(f"{selective_scan.__name__}_triton.{name}", _NotLaunched()))
        yield


class _NotLaunched:
    """A Triton kernel that does nothing to the tensors made for it."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **options: None


class _NoKernels:
    """A module whose functions write nothing into the tensors that they are given."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **options: None


def _instead(module: Any, name: str, stand_in: Any) -> Any:
    original = getattr(module, name)
    half = (torch.float16, torch.bfloat16)
    return mock.patch.object(module, name, lambda x, *rest: (stand_in if x.dtype in half else original)(x, *rest))


class _Kernel(torch.autograd.Function):
    """An operation that keeps its inputs and `kept`, and its output if `keep_output`."""

    @staticmethod
    def forward(ctx: Any, shape: tuple[int, ...], keep_output: bool, kept: list[Tensor], *inputs: Tensor) -> Tensor:
        output = inputs[0].new_empty(shape)
        ctx.save_for_backward(*inputs, *kept, *([output] if keep_output else []))
        ctx.inputs = len(inputs)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad.contiguous()
        inputs = ctx.saved_tensors[: ctx.inputs]
        needed = ctx.needs_input_grad[3:]
        return None, None, None, *(torch.empty_like(x) if n else None for x, n in zip(inputs, needed, strict=True))


def _flash_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, starts: Tensor | None, *_: Any
) -> Tensor:
    """Keeps q, k, v, the output and the logarithms of the softmax's denominators, fp32 [b, heads, s]. With documents,
    the rows of the batch are end to end."""
    if starts is not None:
        query, key, value = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (query, key, value))
    s, b, heads = query.shape[:3]
    denominators = query.new_empty((b, heads, s), dtype=torch.float32)
    return _Kernel.apply(query.shape[:3] + value.shape[3:], True, [denominators], query, key, value)


def _causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, starts: Tensor | None, *_: Any) -> Tensor:
    """Keeps its inputs, and each token's document, one tensor for all layers; the activation is computed again."""
    inputs = (x, weight) if bias is None else (x, weight, bias)
    documents = [] if starts is None else [document_ids_by_row(starts)]
    return _Kernel.apply(x.shape, False, documents, *inputs)
