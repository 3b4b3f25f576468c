"""Output layer and cross entropy in one, for vocabularies whose logits are too large to hold."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_LOGITS = 2**24  # of all tokens with one block of the vocabulary: 64 MiB in fp32
BLOCK_MULTIPLE = 128  # rows, so that matrix products stay aligned


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab_size: int,
    label_smoothing: float = 0.0,
    tp_group: dist.ProcessGroup | None = None,
    block_size: int | None = None,
) -> Tensor:
    """Cross entropy of `hidden @ weight.T`, of which only a block of columns is there at a time.

    The vocabulary is what is cut, not the tokens: each row of `weight` is upcast once a pass, its gradient is summed in
    fp32 over all tokens and written once, and tensor-parallel ranks exchange one maximum and one sum a token, however
    many blocks there are. The backward pass computes the logits again.

    Label smoothing is torch's (`F.cross_entropy`): (1 - e) * nll + e * mean of -log p, the mean over the real
    vocabulary. Rows of padding take part in the softmax, as in Megatron's own loss, and in nothing else.

    Args:
        hidden: [..., h], the same on all ranks. The gradient is this rank's part of it: the caller sums it over
            `tp_group`, as Megatron's `copy_to_` and `gather_from_` regions do.
        weight: [padded vocabulary / tp, h]; rank r has the r-th slice.
        labels: int64 [...], each in [0, vocab_size).
        vocab_size: entries without padding, over all ranks.
        tp_group: ranks that share the vocabulary; None is this process alone.
        block_size: rows of `weight` in a block; by default as many as make `BLOCK_LOGITS` logits.

    Returns:
        Losses [...], fp32. Logits are fp32, from inputs upcast to fp32 (all float64 if the inputs are).
    """
    if block_size is None:
        multiples = BLOCK_LOGITS // (max(labels.numel(), 1) * BLOCK_MULTIPLE)
        block_size = max(multiples, 1) * BLOCK_MULTIPLE
    return _LinearCrossEntropy.apply(hidden, weight, labels, vocab_size, label_smoothing, tp_group, block_size)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        vocab_size: int,
        label_smoothing: float,
        tp_group: dist.ProcessGroup | None,
        block_size: int,
    ) -> Tensor:
        parallel = tp_group is not None and tp_group.size() > 1
        first = tp_group.rank() * len(weight) if tp_group is not None else 0
        local_labels, local_vocab_size = labels.flatten() - first, vocab_size - first
        x = _upcast(hidden.flatten(0, -2))

        # Over the columns so far: the maximum, the sum of exp(logit - maximum), and what the loss takes away from
        # their logarithm, (1 - e) * the label's logit + e * the mean logit.
        maximum = x.new_full(x.shape[:1], -torch.inf)
        sums = x.new_zeros(2, len(x))
        normalizer, taken = sums
        for start in range(0, len(weight), block_size):
            logits = x @ _upcast(weight[start : start + block_size]).t()
            at_label, is_here = _label_column(local_labels, start, logits)
            taken += (1 - label_smoothing) * logits.gather(1, at_label).squeeze(1) * is_here
            if label_smoothing:
                taken += label_smoothing / vocab_size * _real(logits, start, local_vocab_size).sum(1)
            previous, maximum = maximum, torch.maximum(maximum, logits.amax(1))
            normalizer *= (previous - maximum).exp_()
            normalizer += logits.sub_(maximum.unsqueeze(1)).exp_().sum(1)
            del logits  # before the next block's are made
        if parallel:
            own, maximum = maximum, maximum.clone()
            dist.all_reduce(maximum, dist.ReduceOp.MAX, tp_group)
            normalizer *= (own - maximum).exp_()
            dist.all_reduce(sums, group=tp_group)

        ctx.save_for_backward(hidden, weight, local_labels, maximum, normalizer)
        ctx.options = (vocab_size, local_vocab_size, label_smoothing, block_size)
        return (normalizer.log() + (maximum - taken)).view(labels.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, local_labels, maximum, normalizer = ctx.saved_tensors
        vocab_size, local_vocab_size, label_smoothing, block_size = ctx.options
        x = _upcast(hidden.flatten(0, -2))
        grad = grad_losses.reshape(-1, 1)
        grad_x, grad_weight = torch.zeros_like(x), torch.empty_like(weight)
        for start in range(0, len(weight), block_size):
            rows = _upcast(weight[start : start + block_size])
            logits = x @ rows.t()
            at_label, is_here = _label_column(local_labels, start, logits)
            grad_logits = logits.sub_(maximum.unsqueeze(1)).exp_().mul_(grad / normalizer.unsqueeze(1))
            grad_logits.scatter_add_(1, at_label, (label_smoothing - 1) * grad * is_here.unsqueeze(1))
            if label_smoothing:
                _real(grad_logits, start, local_vocab_size).sub_(label_smoothing / vocab_size * grad)
            grad_x.addmm_(grad_logits, rows)
            grad_weight[start : start + block_size] = grad_logits.t() @ x
            del logits, grad_logits  # before the next block's are made
        grad_hidden = grad_x.to(hidden.dtype).view(hidden.shape)
        return grad_hidden, grad_weight, None, None, None, None, None


def _upcast(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _label_column(labels: Tensor, start: int, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Where each token's label is among these columns (int64 [tokens, 1], any column if it is elsewhere), and whether
    it is among them (bool [tokens])."""
    column = labels - start
    last = logits.shape[1] - 1
    return column.clamp(0, last).unsqueeze(1), (column >= 0) & (column <= last)


def _real(columns: Tensor, start: int, vocab_size: int) -> Tensor:
    """The columns without those of padding; `start` and `vocab_size` count from this rank's first row."""
    return columns[:, : max(vocab_size - start, 0)]
