"""What computes an evaluation: log-probabilities of given tokens, and continuations of prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from archscale_megatron.checkpoint.resume import find_checkpoint
from archscale_megatron.checkpoint.retention import iteration_of
from archscale_megatron.evaluation.report import fingerprint
from archscale_megatron.hf.folder import CONFIG

SHORTEST_PREFIX = 8  # tokens; to share fewer does not pay for another forward pass


@dataclass(frozen=True)
class Sampling:
    """How prompts are continued.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_p: sample from the likeliest tokens of this mass.
        top_k: sample from so many of the likeliest tokens; 0 is all.
        stop: a text ends before the first of these.
        seed: of the samples.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class Scored:
    """
    Attributes:
        logprobs: fp32 [n], of each scored token given all before it.
        greedy: bool [n]: it was the likeliest.
    """

    logprobs: Tensor
    greedy: Tensor


@dataclass(frozen=True)
class Generated:
    """
    Attributes:
        ids: with the token that ended the text, and those of a stop string.
        text: without them.
        ended: by a token or a stop string, rather than by the number of tokens.
    """

    ids: list[int]
    text: str
    ended: bool


class Engine(Protocol):
    """A model that scores and continues sequences of tokens.

    Attributes:
        tokenizer: a fast tokenizer of transformers.
        end: ids after which a text has ended.
        max_length: tokens that the model reads at once: the trained context, unless asked otherwise.
        source: what a report says of the checkpoint.
        rank, world_size: of data parallelism. A rank computes what it is given; who calls divides the work.
    """

    tokenizer: Any
    end: tuple[int, ...]
    max_length: int
    source: dict[str, Any]
    rank: int
    world_size: int

    def score(self, sequences: Sequence[Sequence[int]], first: Sequence[int]) -> Iterator[tuple[int, Scored]]:
        """(index, scores of the tokens first[index] ... of the sequence), in the order in which batches end.

        The last token of a sequence is not read, only scored, so that it may have max_length + 1 tokens; first >= 1.
        """
        ...

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, numbers: Sequence[int] | None = None
    ) -> Iterator[tuple[int, Generated]]:
        """(index, continuation), in the order in which texts end.

        The random numbers of a prompt depend on the seed and its number, not on its batch.

        Args:
            numbers: one a prompt, so that a part of a work may be done on its own; their indices unless given.
        """
        ...


def source_of(path: Path, family: str, depth: int) -> dict[str, Any]:
    """`Engine.source` of the model in a run directory, a checkpoint or an export."""
    exported = (path / CONFIG).exists()
    model = path if exported else find_checkpoint(path)
    return {
        "path": str(model.resolve()),
        "iteration": None if exported else iteration_of(model),
        "fingerprint": fingerprint(model),
        "architecture": f"{family}_d{depth}",
    }


def by_length(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices in batches, the longest first; a batch, padded, has at most `budget` tokens or one sequence.

    A batch ends, too, where more than a sixteenth of the budget would be padding.
    """
    batch: list[int] = []
    padding = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch:
            padding += lengths[batch[0]] - lengths[index]
            if (len(batch) + 1) * lengths[batch[0]] > budget or padding > budget // 16:
                yield batch
                batch, padding = [], 0
        batch.append(index)
    if batch:
        yield batch


def padded(sequences: Sequence[Sequence[int]], *, left: bool = False) -> Tensor:
    """int64 [b, s], zeros behind (or before) what is shorter than the longest."""
    width = max(map(len, sequences))
    gaps = ([0] * (width - len(one)) for one in sequences)
    rows = [[*gap, *one] if left else [*one, *gap] for gap, one in zip(gaps, sequences, strict=True)]
    return torch.tensor(rows, dtype=torch.int64).view(len(rows), width)


@dataclass(frozen=True)
class Batch:
    """Sequences to score together.

    Attributes:
        prefixes: of one length, which may be 0; each is to be computed once.
        rows: sequences, by their index, and which prefix each begins with.
    """

    prefixes: list[Sequence[int]]
    rows: list[tuple[int, int]]


def scoring_batches(sequences: Sequence[Sequence[int]], first: Sequence[int], budget: int) -> Iterator[Batch]:
    """What `Engine.score` computes together, each sequence once.

    The prefixes of a batch are cut to the shortest, so that no row of it needs padding on the left.
    """
    groups = shared_prefixes(sequences, [one - 1 for one in first])
    alone = [index for prefix, indices in groups if not prefix for index in indices]
    for batch in by_length([len(sequences[i]) - 1 for i in alone], budget):
        yield Batch([[]], [(alone[i], 0) for i in batch])
    sharing = sorted((group for group in groups if group[0]), key=lambda group: -group[0])
    pending: list[tuple[int, list[int]]] = []
    for group in sharing:
        full = pending and (len(pending) + 1) * pending[0][0] > budget
        if full or (pending and group[0] < 0.9 * pending[0][0]):
            yield _of_groups(sequences, pending)
            pending = []
        pending.append(group)
    if pending:
        yield _of_groups(sequences, pending)


def _of_groups(sequences: Sequence[Sequence[int]], groups: list[tuple[int, list[int]]]) -> Batch:
    length = groups[-1][0]
    prefixes = [sequences[indices[0]][:length] for _, indices in groups]
    return Batch(prefixes, [(index, i) for i, (_, indices) in enumerate(groups) for index in indices])


def shared_prefixes(sequences: Sequence[Sequence[int]], limits: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Groups of sequences with a common prefix: its length, and their indices. Each is in one group.

    Neighbours in alphabetical order join while that saves more tokens than ending the group would.

    Args:
        limits: the longest prefix that a sequence may share.
    """
    groups: list[tuple[int, list[int]]] = []
    for index in sorted(range(len(sequences)), key=lambda i: tuple(sequences[i])):
        if groups:
            length, members = groups[-1]
            common = _common(sequences[members[-1]], sequences[index], min(length, limits[index]))
            if common >= SHORTEST_PREFIX and common * len(members) > length * (len(members) - 1):
                groups[-1] = (common, [*members, index])
                continue
        groups.append((limits[index], [index]))
    return [(length if len(members) > 1 else 0, members) for length, members in groups]


def _common(one: Sequence[int], other: Sequence[int], limit: int) -> int:
    """Length of the common prefix, at most `limit`."""
    for i in range(min(limit, len(one), len(other))):
        if one[i] != other[i]:
            return i
    return min(limit, len(one), len(other))


def generator(seed: int, index: int) -> torch.Generator:
    """The random numbers of prompt `index`."""
    digest = hashlib.blake2b(f"{seed} {index}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def draw(logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> Tensor:
    """The next token of each row, int64 [b], from logits [b, vocabulary] and one random number a row.

    As transformers does: temperature, then the top_k, then the likeliest of them with the mass top_p.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    ordered, ids = (logits.float() / sampling.temperature).sort(dim=-1, descending=True, stable=True)
    if sampling.top_k:
        ordered = ordered[:, : sampling.top_k]
    probabilities = ordered.softmax(-1)
    mass = probabilities.cumsum(-1)
    mass = mass.where(mass - probabilities < sampling.top_p, -1.0)  # what is behind top_p
    total = mass.amax(-1, keepdim=True)
    uniform = torch.stack([torch.rand((), generator=one) for one in generators]).to(logits.device)[:, None]
    place = ((mass >= 0) & (mass <= uniform * total)).sum(-1, keepdim=True)
    return ids.gather(-1, place.clamp(max=ordered.shape[-1] - 1)).squeeze(-1)
