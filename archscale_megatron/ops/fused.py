"""Where our Triton kernels between matrix products serve: on a GPU. Elsewhere, and in float64, torch code does."""

from __future__ import annotations

import importlib
import os
from typing import Any

import torch
from torch import Tensor

from archscale_megatron.ops.packages import optional

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def kernels(name: str, *tensors: Tensor) -> Any | None:
    """The module `ops.<name>_triton` if its kernels can serve these tensors, else None.

    A kernel module has functions that write their results into tensors that they are given, and allocate nothing:
    so a dry run can leave them out.
    """
    # On a CPU: Triton's interpreter, for tests.
    there = all(x.is_cuda for x in tensors) or os.environ.get("TRITON_INTERPRET") == "1"
    if not there or any(x.dtype not in _DTYPES for x in tensors) or optional("triton") is None:
        return None
    return importlib.import_module(f"{__package__}.{name}_triton")


def rows(x: Tensor) -> Tensor:
    """[..., n] -> [rows, n] with the elements of a row side by side; a view if possible."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()
