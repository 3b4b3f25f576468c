"""Cross entropy of logits on a GPU, in one pass over them each way."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from archscale_megatron.ops import fused


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    vocab_size: int,
    label_smoothing: float = 0.0,
    tp_group: dist.ProcessGroup | None = None,
) -> Tensor | None:
    """Cross entropy of logits, which it may take for its own: the backward pass writes their gradient over them.

    That asks for an output that nobody else keeps, such as a matrix product's. Autograd refuses a second backward pass,
    and the backward pass of whatever else has kept the logits.

    Label smoothing is torch's (`F.cross_entropy`): (1 - e) * nll + e * mean of -log p, the mean over the real
    vocabulary. Columns of padding take part in the softmax, as in Megatron's own loss, and in nothing else.

    Args:
        logits: [..., padded vocabulary / tp]; rank r has the r-th slice.
        labels: int64 [...], each in [0, vocab_size).
        vocab_size: entries without padding, over all ranks.
        tp_group: ranks that share the vocabulary; None is this process alone.

    Returns:
        Losses [...], fp32; None where no kernel of ours serves: on a CPU, or of float64.
    """
    kernels = fused.kernels("cross_entropy", logits)
    if kernels is None:
        return None
    return _CrossEntropy.apply(kernels, logits, labels, vocab_size, label_smoothing, tp_group)


class _CrossEntropy(torch.autograd.Function):
    """Keeps the logits, and of each row the label, the maximum and the sum of exponentials."""

    @staticmethod
    def forward(
        ctx: Any,
        kernels: Any,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        label_smoothing: float,
        tp_group: dist.ProcessGroup | None,
    ) -> Tensor:
        x, flat_labels = fused.rows(logits), labels.reshape(-1).contiguous()
        parallel = tp_group is not None and tp_group.size() > 1
        first = tp_group.rank() * x.shape[1] if tp_group is not None else 0
        maximum = torch.empty(len(x), dtype=torch.float32, device=x.device)
        sums = maximum.new_empty(2, len(x))
        normalizer, taken = sums  # the latter is what the loss takes away from the logarithm of the former
        kernels.forward(x, flat_labels, first, vocab_size, label_smoothing, maximum, normalizer, taken)
        if parallel:
            own, maximum = maximum, maximum.clone()
            dist.all_reduce(maximum, dist.ReduceOp.MAX, tp_group)
            normalizer *= (own - maximum).exp_()
            dist.all_reduce(sums, group=tp_group)

        ctx.save_for_backward(logits, flat_labels, maximum, normalizer)
        ctx.kernels, ctx.options = kernels, (first, vocab_size, label_smoothing)
        return (normalizer.log() + (maximum - taken)).view(labels.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels, maximum, normalizer = ctx.saved_tensors
        x = fused.rows(logits)
        ctx.kernels.backward(grad.reshape(-1).contiguous(), x, labels, *ctx.options, maximum, normalizer)
        torch.autograd.graph.increment_version(logits)  # autograd does not see what kernels write
        return None, x.view(logits.shape), None, None, None, None
