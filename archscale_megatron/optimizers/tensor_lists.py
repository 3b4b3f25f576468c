"""What Apex and Transformer Engine do to all tensors of a list at once (`multi_tensor_apply`), by torch's `_foreach`.

Arguments are those that Megatron passes: a chunk size and an overflow flag, which torch needs no more, come first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def l2_norm(chunk_size: int, overflow: Tensor, lists: list[list[Tensor]], *_: Any) -> tuple[Tensor, None]:
    """The norm of all tensors as one vector, fp32 [1], without waiting for the device."""
    norms = torch._foreach_norm([tensor for tensors in lists for tensor in tensors])
    return torch.linalg.vector_norm(torch.stack(norms).float()).reshape(1), None


def scale(chunk_size: int, overflow: Tensor, lists: list[list[Tensor]], factor: float) -> None:
    """Write `factor` times each tensor of the first list into the second's, which may be the same tensors, or of
    another dtype."""
    sources, targets = lists
    in_place = all(source is target for source, target in zip(sources, targets, strict=True))
    if in_place:
        torch._foreach_mul_(targets, factor)
    else:
        torch._foreach_copy_(targets, sources if factor == 1 else torch._foreach_mul(sources, factor))
