"""Megatron's hybrid model with the loss that the config asks for: from blocks of the vocabulary, smoothed labels."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor

from archscale_megatron.ops.cross_entropy import cross_entropy
from archscale_megatron.ops.linear_cross_entropy import linear_cross_entropy


class OutputLayer(ColumnParallelLinear):
    """Megatron's output layer; while it has labels, its output are their losses instead of logits.

    The losses are computed within its call, because that is what overlapped parameter gathering waits for.
    """

    labels: Tensor | None = None  # int64 [b, s]

    def _forward_impl(self, input: Tensor, weight: Tensor, **options: Any) -> Tensor:
        if self.labels is None:
            return super()._forward_impl(input, weight, **options)
        if options["sequence_parallel"]:
            input = gather_from_sequence_parallel_region(input, group=self.tp_group)
        elif options["allreduce_dgrad"]:
            input = copy_to_tensor_model_parallel_region(input, group=self.tp_group)
        return linear_cross_entropy(
            input,
            weight,
            self.labels.transpose(0, 1),
            vocab_size=self.config.architecture.vocab_size,
            label_smoothing=self.config.label_smoothing,
            tp_group=self.tp_group,
        )


class HybridLanguageModel(HybridModel):
    """Megatron's HybridModel, with the loss that `chunked_cross_entropy` and `label_smoothing` of the config ask for.

    Without labels it returns logits, as Megatron's does.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.post_process and self.config.chunked_cross_entropy:
            self.output_layer.__class__ = OutputLayer  # Megatron builds its own by name; ours has no more state

    def forward(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Tensor:
        """As HybridModel's: labels int64 [b, s] -> losses fp32 [b, s]; without them logits [b, s, vocabulary / tp]."""
        if labels is None or not (self.post_process and self.config.chunked_cross_entropy):
            return super().forward(*args, labels=labels, **kwargs)
        self.output_layer.labels = labels
        try:
            return super().forward(*args, **kwargs)  # what Megatron transposes here as logits are the losses
        finally:
            self.output_layer.labels = None

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Loss of logits [s, b, vocabulary / tp] with torch's label smoothing (see `ops`), fp32 [b, s]: on a GPU ours,
        which writes over the logits; elsewhere, and where its fused one is asked for, Megatron's.

        nll + e * (logit of the label - mean logit) is (1 - e) * nll + e * mean of -log p.
        """
        smoothing = self.config.label_smoothing
        vocab_size = self.config.architecture.vocab_size
        if not self.config.cross_entropy_loss_fusion:
            losses = cross_entropy(
                logits,
                labels.transpose(0, 1),
                vocab_size=vocab_size,
                label_smoothing=smoothing,
                tp_group=self.tp_group,
            )
            if losses is not None:
                return losses.transpose(0, 1).contiguous()
        if not smoothing:
            return super().compute_language_model_loss(labels, logits)
        first = self.tp_group.rank() * logits.shape[-1]
        column = labels.transpose(0, 1).flatten() - first
        is_here = (column >= 0) & (column < logits.shape[-1])
        rows = torch.arange(len(column), device=logits.device)
        # Indexed, not gathered: autograd keeps the input of a gather, and Megatron's loss writes over the logits.
        at_label = logits.flatten(0, 1)[rows, column.clamp(0, logits.shape[-1] - 1)].float() * is_here
        mean = logits[..., : max(vocab_size - first, 0)].sum(-1, dtype=torch.float32) / vocab_size
        above_mean = reduce_from_tensor_model_parallel_region(at_label.view_as(mean) - mean, group=self.tp_group)
        nll = super().compute_language_model_loss(labels, logits)
        return nll + smoothing * above_mean.transpose(0, 1)
