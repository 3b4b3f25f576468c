"""Kernels of other packages: whether a package is there, and how tensors must lie for it."""

import functools
import importlib
import warnings
from types import ModuleType

import torch
from torch import Tensor


@functools.cache
def optional(name: str) -> ModuleType | None:
    """The package, or None where it is not installed or does not load: built for another torch, say, of which a warning
    then tells once."""
    try:
        return importlib.import_module(name)
    except Exception as error:
        if not (isinstance(error, ModuleNotFoundError) and error.name == name):
            warnings.warn(f"{name} is installed but does not load, so torch does without: {error!r}", stacklevel=2)
        return None


def aligned(x: Tensor) -> Tensor:
    """x [..., d], copied unless every row of d elements is dense and begins at a multiple of 8 elements: kernels load 8
    of bf16, 16 bytes, at once."""
    in_place = x.stride(-1) == 1 and all(n % 8 == 0 for n in (x.storage_offset(), *x.stride()[:-1]))
    return x if in_place else x.clone(memory_format=torch.contiguous_format)
