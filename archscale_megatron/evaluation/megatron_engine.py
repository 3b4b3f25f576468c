"""The engine that computes with Megatron's own model, at any layout: of a checkpoint under torchrun, or in training.

Every rank calls it with the same requests and gets all results: data-parallel ranks divide them among themselves.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from archscale_megatron import cpu, single_process
from archscale_megatron.archs.architecture import Architecture
from archscale_megatron.archs.splits import split_by_compute
from archscale_megatron.checkpoint import CheckpointError
from archscale_megatron.checkpoint.resume import find_checkpoint
from archscale_megatron.checkpoint.tensors import CheckpointTensors
from archscale_megatron.evaluation.engine import Generated, Sampling, Scored, draw, source_of
from archscale_megatron.evaluation.transformers_engine import Text
from archscale_megatron.hf.archscale import context_length
from archscale_megatron.hf.loading import tokenizer_of_run

if TYPE_CHECKING:
    from archscale_megatron.evaluation.megatron_forward import Head, MicroBatch

EXTRA_STATE = "_extra_state"
FP8_MULTIPLE = 16  # of the tokens of a batch, on each tensor-parallel rank


@dataclass
class Row:
    """A sequence that is computed.

    Attributes:
        tokens: ids.
        wanted: positions whose logits are wanted.
        labels: a number for each (see `megatron_forward.Head`).
        parts: (request, number of its `wanted`), in their order.
    """

    tokens: list[int]
    wanted: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    parts: list[tuple[int, int]] = field(default_factory=list)

    def ask(self, request: int, wanted: Sequence[int], labels: Sequence[int]) -> None:
        """Want these logits too, for `request`."""
        self.wanted += wanted
        self.labels += labels
        self.parts.append((request, len(wanted)))


class MegatronEngine:
    """An `Engine` over this rank's chunks of a Megatron model, which are in evaluation mode while it computes.

    Padding stands behind a text, where causal layers, and experts that drop no tokens, do not see it. A sampled text
    depends on the seed, on the prompt's number and on rounding, which the batch may change.

    Args:
        chunks: one a virtual pipeline stage, as `pretrain` has them.
        tokenizer, end, max_length, source: as in `Engine`.
        batch_tokens: of a micro-batch, padding included; a longer text is a batch of its own.
    """

    # Of those that divide requests: none does, since the engine divides them.
    rank = 0
    world_size = 1

    def __init__(
        self,
        chunks: Sequence[Any],
        *,
        tokenizer: Any,
        end: tuple[int, ...],
        max_length: int,
        source: dict[str, Any],
        batch_tokens: int,
    ) -> None:
        from megatron.core.utils import get_model_config

        from archscale_megatron.evaluation.megatron_forward import Vocabulary

        self._chunks = chunks
        self._config = get_model_config(chunks[0])
        self.tokenizer, self.end, self.max_length, self.source = tokenizer, end, max_length, source
        self._batch_tokens = batch_tokens
        self._vocabulary = Vocabulary(self._config.architecture.vocab_size, _groups()[0])

    def score(self, sequences: Sequence[Sequence[int]], first: Sequence[int]) -> Iterator[tuple[int, Scored]]:
        """As in `Engine`. A text with which another one begins is not computed again."""
        texts = [list(sequence[:-1]) for sequence in sequences]
        rows: list[Row] = []
        for request in sorted(range(len(texts)), key=texts.__getitem__, reverse=True):
            text, start = texts[request], first[request] - 1
            if not rows or rows[-1].tokens[: len(text)] != text:
                rows.append(Row(text))
            rows[-1].ask(request, range(start, len(text)), sequences[request][start + 1 :])
        for request, values in self._compute(rows, self._vocabulary.scores, 2):
            yield request, Scored(values[:, 0], values[:, 1].bool())

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, numbers: Sequence[int] | None = None
    ) -> Iterator[tuple[int, Generated]]:
        """As in `Engine`; each token is a forward pass over all before it."""
        longest = max(map(len, prompts), default=0) + sampling.max_new_tokens
        together = self._rows(longest) * self._micro_batches() * _groups()[1].size()
        for start in range(0, len(prompts), together):
            indices = range(start, min(start + together, len(prompts)))
            texts = {i: Text(self, i, prompts[i], sampling, numbers) for i in indices}
            while texts:
                rows = [Row([*prompts[i], *text.ids]) for i, text in texts.items()]
                for i, row in zip(texts, rows, strict=True):
                    row.ask(i, [len(row.tokens) - 1], [i])
                for i, token in list(self._compute(rows, self._next(texts, sampling), 1)):
                    torch.rand((), generator=texts[i].generator)  # as the ranks have done that drew the token
                    if not texts[i].add(int(token)):
                        yield i, texts.pop(i).generated()

    def _next(self, texts: dict[int, Text], sampling: Sampling) -> Head:
        """The next token of the texts whose indices are the labels."""
        if sampling.temperature == 0:
            return self._vocabulary.likeliest
        return self._vocabulary.sampled(
            lambda logits, indices: draw(logits, sampling, [texts[i].generator.clone_state() for i in indices.tolist()])
        )

    def _compute(self, rows: Sequence[Row], head: Head, columns: int) -> Iterator[tuple[int, Tensor]]:
        """(request, values [n, columns] of its wanted logits, on the CPU), longest rows first."""
        from archscale_megatron.evaluation.megatron_forward import forward

        _, data_parallel = _groups()
        replicas, mine = data_parallel.size(), data_parallel.rank()
        least = self._micro_batches()
        rows = sorted(rows, key=lambda row: -len(row.tokens))
        while rows:
            length = self._padded(len(rows[0].tokens))
            now = rows[: self._rows(length) * least * replicas]
            rows = rows[len(now) :]
            size = math.ceil(len(now) / (least * replicas))
            # Micro-batch k of replica d has the (k * replicas + d)-th `size` rows; the last ones have fewer, or none.
            count = least if len(self._chunks) > 1 else math.ceil(len(now) / (size * replicas))
            cells = [now[cell * size : (cell + 1) * size] for cell in range(count * replicas)]
            batches = [self._micro_batch(cell, size, length) for cell in cells[mine::replicas]]
            found = forward(self._chunks, batches, head, columns)
            wanted = [[row for cell in cells[d::replicas] for row in cell] for d in range(replicas)]
            lengths = [sum(len(row.wanted) for row in of_replica) for of_replica in wanted]
            for of_replica, values in zip(wanted, _gathered(found, lengths, data_parallel), strict=True):
                parts = [part for row in of_replica for part in row.parts]
                pieces = values.cpu().split([number for _, number in parts])
                yield from zip((request for request, _ in parts), pieces, strict=True)

    def _micro_batch(self, rows: Sequence[Row], size: int, length: int) -> MicroBatch:
        from archscale_megatron.evaluation.megatron_forward import MicroBatch

        device = torch.cuda.current_device()
        tokens = torch.zeros(size, length, dtype=torch.int64)
        for i, row in enumerate(rows):
            tokens[i, : len(row.tokens)] = torch.tensor(row.tokens)
        wanted = [position * size + i for i, row in enumerate(rows) for position in row.wanted]
        labels = [label for row in rows for label in row.labels]
        return MicroBatch(*(torch.as_tensor(x, dtype=torch.int64).to(device) for x in (tokens, wanted, labels)))

    def _rows(self, length: int) -> int:
        return max(self._batch_tokens // length, 1)

    def _micro_batches(self) -> int:
        from archscale_megatron.evaluation.megatron_forward import least_micro_batches

        return least_micro_batches(self._chunks)

    def _padded(self, length: int) -> int:
        """A length that sequence parallelism and FP8 can divide."""
        multiple = self._config.tensor_model_parallel_size if self._config.sequence_parallel else 1
        multiple *= FP8_MULTIPLE if self._config.fp8 else 1
        return math.ceil(length / multiple) * multiple


def _groups() -> tuple[Any, Any]:
    """The tensor- and data-parallel groups of this rank."""
    from megatron.core import mpu

    return mpu.get_tensor_model_parallel_group(), mpu.get_data_parallel_group()


def _gathered(values: Tensor, lengths: Sequence[int], group: Any) -> list[Tensor]:
    """Each rank's `values` [lengths[rank], c], on all ranks of the group."""
    if len(lengths) == 1:
        return [values]
    padded = values.new_zeros(max(lengths), values.shape[1])
    padded[: len(values)] = values
    everywhere = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(everywhere, padded, group=group)
    return [found[:length] for found, length in zip(everywhere, lengths, strict=True)]


def open_checkpoint(
    path: Path,
    *,
    tensor: int = 1,
    pipeline: int = 1,
    dtype: torch.dtype | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    tokenizer_model: str | None = None,
) -> MegatronEngine:
    """The model of a checkpoint that any layout wrote, on the processes that torchrun started.

    Call it before the first import of Megatron; it makes the process groups.

    Args:
        path: a run directory, or one checkpoint.
        tensor, pipeline: ranks over which each is split; the others are data parallel.
        dtype: of the weights; None is what is stored.
        batch_size: as many tokens at once as so many sequences of `max_length` have.
        max_length: None is the trained context.
        tokenizer_model: where the tokenizer is now, if it was moved.
    Raises:
        CheckpointError, HFError, ValueError: it cannot be used, or not at this layout; the message is one line.
    """
    single_process.quietly_install()
    checkpoint = find_checkpoint(path)
    tensors = CheckpointTensors(checkpoint)
    arch = tensors.architecture
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if tensor not in (legal := arch.tensor_parallel_sizes()):
        raise ValueError(f"tensor parallelism of {tensor}: {arch.family} can be split by {', '.join(map(str, legal))}")
    if world_size % (tensor * pipeline):
        raise ValueError(
            f"{world_size} processes: tensor x pipeline parallelism of {tensor} x {pipeline} needs a multiple of "
            f"{tensor * pipeline}; start them with torchrun"
        )
    length = max_length or context_length(tensors.run)
    pattern = split_by_compute(arch, pipeline, length)
    tokenizer, end = tokenizer_of_run(tensors.run, path, tokenizer_model)
    _start(tensor, pipeline)
    model = _loaded(checkpoint, arch, pattern, dtype or tensors.dtype("embedding.word_embeddings.weight"), length)
    return MegatronEngine(
        [model],
        tokenizer=tokenizer,
        end=end,
        max_length=length,
        source=source_of(checkpoint, arch.family, arch.depth),
        batch_tokens=batch_size * length,
    )


def _start(tensor: int, pipeline: int) -> None:
    """Megatron's process groups, those of torchrun's processes; alone, a process is a group."""
    from megatron.core import mpu
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if not cpu.ACTIVE:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    backend = "gloo" if cpu.ACTIVE else "nccl"
    if not dist.is_initialized():
        if "RANK" in os.environ:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    mpu.initialize_model_parallel(tensor, pipeline)
    model_parallel_cuda_manual_seed(1)


def _loaded(checkpoint: Path, arch: Architecture, pattern: str, dtype: torch.dtype, length: int) -> Any:
    """This rank's stage, with the weights of the checkpoint, in evaluation mode."""
    from megatron.core import dist_checkpointing, mpu
    from megatron.core.transformer.module import Float16Module

    from archscale_megatron.model.config import config_of
    from archscale_megatron.model.spec import build_model
    from archscale_megatron.training.megatron_options import VOCABULARY_MULTIPLE

    tensor = mpu.get_tensor_model_parallel_world_size()
    config = config_of(
        arch, dtype, bf16=dtype == torch.bfloat16, fp16=dtype == torch.float16, layer_pattern=pattern,
        is_hybrid_model=True, tensor_model_parallel_size=tensor, sequence_parallel=tensor > 1,
        pipeline_model_parallel_size=mpu.get_pipeline_model_parallel_world_size(), deallocate_pipeline_outputs=True,
        init_model_with_meta_device=True,  # no initial values: all are loaded
    )  # fmt: skip
    multiple = math.lcm(VOCABULARY_MULTIPLE, tensor)
    model = build_model(
        config,
        padded_vocab_size=math.ceil(arch.vocab_size / multiple) * multiple,
        max_sequence_length=length,
        seed=0,
        pre_process=mpu.is_pipeline_first_stage(),
        post_process=mpu.is_pipeline_last_stage(),
    ).cuda()
    whole = Float16Module(config, model) if dtype != torch.float32 else model
    # A layer's `_extra_state` is of Transformer Engine's FP8, which this model has not.
    sharded = {name: part for name, part in model.sharded_state_dict().items() if not name.endswith(EXTRA_STATE)}
    stored = dist_checkpointing.load(dict(sharded), str(checkpoint))
    found = model.load_state_dict({name: stored[name] for name in sharded}, strict=False)
    if missing := [name for name in found.missing_keys if not name.endswith(EXTRA_STATE)]:
        raise CheckpointError(f"{checkpoint} has no {missing[0]}")
    return whole.eval()
