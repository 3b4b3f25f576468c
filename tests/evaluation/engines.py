"""Engines for tests: of known numbers, and of a float64 model without any batching."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from archscale_megatron.evaluation.engine import Scored


class KnownEngine:
    """The log-probability of a token is `-loss(token, context)`, where context is how many tokens are before it.

    Results come in a random order. `asked` counts the tokens that were scored.
    """

    end = (1,)
    rank, world_size = 0, 1

    def __init__(self, loss: Callable[[int, int], float], tokenizer: Any = None, max_length: int = 64) -> None:
        self._loss, self.tokenizer, self.max_length = loss, tokenizer, max_length
        self.source: dict[str, Any] = {"path": "known", "iteration": None, "fingerprint": "0", "architecture": "none"}
        self.asked = 0

    def score(self, sequences: Sequence[Sequence[int]], first: Sequence[int]) -> Iterator[tuple[int, Scored]]:
        order = list(range(len(sequences)))
        random.Random(len(order)).shuffle(order)
        for index in order:
            sequence, start = sequences[index], first[index]
            assert 1 <= start < len(sequence) <= self.max_length + 1
            losses = [self._loss(sequence[i], i) for i in range(start, len(sequence))]
            self.asked += len(losses)
            # Beyond fp32 where that would hide a wrong token.
            yield index, Scored(-torch.tensor(losses, dtype=torch.float64), torch.zeros(len(losses), dtype=torch.bool))


class PlainEngine(KnownEngine):
    """Of a model of transformers: one sequence at a time, all logits."""

    def __init__(self, model: Any) -> None:
        super().__init__(lambda token, context: 0.0)
        self._model = model

    def score(self, sequences: Sequence[Sequence[int]], first: Sequence[int]) -> Iterator[tuple[int, Scored]]:
        for index, (sequence, start) in enumerate(zip(sequences, first, strict=True)):
            ids = torch.tensor(sequence)
            with torch.inference_mode():
                logprobs = self._model(ids[None, :-1]).logits[0, start - 1 :].double().log_softmax(-1)
            picked = logprobs.gather(-1, ids[start:, None])[:, 0]
            yield index, Scored(picked, logprobs.argmax(-1) == ids[start:])
