"""Batches through a Megatron model, at any layout: what is asked of the logits of a few tokens, without the others'.

The output layer is asked at the wanted tokens alone, and no rank ever has the logits of the whole vocabulary, except to
sample from them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from megatron.core.utils import get_model_config, unwrap_model
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

BLOCK = 2**24  # logits that a rank has at a time

Head = Callable[[Tensor, Tensor], Tensor]
"""logits fp32 [n, vocabulary / tp] of this rank, and a number [n] for each -> [n, c], the same on all TP ranks."""


@dataclass(frozen=True)
class MicroBatch:
    """
    Attributes:
        tokens: int64 [b, s].
        wanted: int64 [n], position * b + row of the tokens whose logits are wanted.
        labels: int64 [n], what `Head` is told of each.
    """

    tokens: Tensor
    wanted: Tensor
    labels: Tensor


@torch.no_grad()  # not inference_mode: Megatron caches rotary embeddings, which training goes on with
def forward(chunks: Sequence[Any], batches: Sequence[MicroBatch], head: Head, columns: int) -> Tensor:
    """What `head` makes of the wanted logits, fp32 [n of all batches, c], on every rank of a model-parallel group.

    Args:
        chunks: this rank's part of the model, one a virtual stage, in evaluation mode.
        batches: of one shape; at least `least_micro_batches`.
        columns: c.
    """
    rows, length = batches[0].tokens.shape
    total = sum(len(batch.wanted) for batch in batches)

    def step(batches: Iterator[MicroBatch], model: Any) -> tuple[Tensor, Any]:
        batch, core = next(batches), unwrap_model(model)
        positions = torch.arange(length, device=batch.tokens.device).expand_as(batch.tokens)
        with _asked(core, batch, head) if core.post_process else contextlib.nullcontext():
            output = model(batch.tokens, positions, None)
        return output, lambda output, **_: output[0]

    interleaved = len(chunks) > 1
    found = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(batches) for _ in chunks] if interleaved else iter(batches),
        model=list(chunks) if interleaved else chunks[0],
        num_microbatches=len(batches),
        seq_length=length,
        micro_batch_size=rows,
        forward_only=True,
        collect_non_loss_data=True,
    )
    if mpu.get_pipeline_model_parallel_world_size() == 1:
        return torch.cat(found)
    last = mpu.get_pipeline_model_parallel_last_rank()
    is_last = dist.get_rank() == last
    result = torch.cat(found) if is_last else torch.empty(total, columns, device=batches[0].tokens.device)
    dist.broadcast(result, last, group=mpu.get_pipeline_model_parallel_group())
    return result


def least_micro_batches(chunks: Sequence[Any]) -> int:
    """How many micro-batches fill the pipeline; the interleaved schedule takes no fewer."""
    if len(chunks) > 1:
        return get_model_config(chunks[0]).microbatch_group_size_per_vp_stage
    return mpu.get_pipeline_model_parallel_world_size()


@contextlib.contextmanager
def _asked(model: Any, batch: MicroBatch, head: Head) -> Iterator[None]:
    """Inside, the output layer returns `head` of the wanted tokens' logits instead of all logits.

    In the layer's own call, which is what overlapped gathering of parameters waits for.
    """
    layer = model.output_layer

    def forward(input: Tensor, weight: Tensor | None = None, **_: Any) -> tuple[Tensor, None]:
        """input [s, b, h] (s / tp under sequence parallelism) -> [n, 1, c]."""
        if layer.sequence_parallel:
            input = gather_from_sequence_parallel_region(input, group=layer.tp_group)
        weight = layer.weight if weight is None else weight
        size = max(BLOCK // len(weight), 1)
        blocks = zip(input.flatten(0, 1)[batch.wanted].split(size), batch.labels.split(size), strict=True)
        parts = [head(torch.nn.functional.linear(hidden, weight).float(), labels) for hidden, labels in blocks]
        return torch.cat(parts).unsqueeze(1), None

    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward


class Vocabulary:
    """What is asked of logits whose vocabulary is split over the tensor-parallel ranks.

    Args:
        size: entries; rows of the output layer behind them are padding.
    """

    def __init__(self, size: int, group: ProcessGroup) -> None:
        self._size, self._group = size, group

    def scores(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(log p, is it the likeliest?) of each label, [n, 2]."""
        first, largest, best = self._likeliest(logits)
        column = labels - first
        is_here = (column >= 0) & (column < logits.shape[-1])
        at_label = logits.gather(1, column.clamp(0, logits.shape[-1] - 1)[:, None])[:, 0]
        sums = torch.stack([(logits - largest[:, None]).exp().sum(-1), at_label.masked_fill(~is_here, 0)])
        self._reduce(sums, ReduceOp.SUM)
        logprobs = sums[1] - largest - sums[0].log()
        return torch.stack([logprobs, (best == labels).float()], 1)

    def likeliest(self, logits: Tensor, _: Tensor) -> Tensor:
        """The likeliest id, the lowest of equals, [n, 1]; ids are exact in fp32 up to 2^24."""
        return self._likeliest(logits)[2].float()[:, None]

    def sampled(self, draw: Callable[[Tensor, Tensor], Tensor]) -> Head:
        """A head that gathers the logits, [n, vocabulary], and returns the ids that `draw` chooses, [n, 1]."""

        def head(logits: Tensor, labels: Tensor) -> Tensor:
            whole = gather_from_tensor_model_parallel_region(logits, group=self._group)
            ids = draw(whole[:, : self._size], labels) if len(labels) else labels
            return ids.float()[:, None]

        return head

    def _likeliest(self, logits: Tensor) -> tuple[int, Tensor, Tensor]:
        """The first id of this rank, the largest logit [n] and its id [n]; logits of padding become -inf."""
        first = self._group.rank() * logits.shape[-1]
        logits[:, max(self._size - first, 0) :] = float("-inf")
        largest, best = logits.max(-1)
        everywhere = largest.clone()
        self._reduce(everywhere, ReduceOp.MAX)
        best = torch.where(largest == everywhere, best + first, self._size)
        self._reduce(best, ReduceOp.MIN)
        return first, everywhere, best

    def _reduce(self, values: Tensor, operation: Any) -> None:
        if self._group.size() > 1:
            dist.all_reduce(values, operation, group=self._group)
