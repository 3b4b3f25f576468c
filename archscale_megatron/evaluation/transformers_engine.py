"""The engine of one process, or of several that each have the whole model: our transformers class, with its cache."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from archscale_megatron.evaluation.engine import (
    Generated,
    Sampling,
    Scored,
    by_length,
    draw,
    generator,
    padded,
    scoring_batches,
    source_of,
)
from archscale_megatron.evaluation.options import BATCH_SIZE
from archscale_megatron.generate import Decoder
from archscale_megatron.hf.loading import load
from archscale_megatron.hf.modeling_archscale import ArchScaleCache

CPU_TOKENS = 1024
LOGITS = 1 << 23  # elements of the logits in memory at once


class TransformersEngine:
    """See `Engine`.

    Attributes:
        model: our class of transformers, on its device.
    """

    def __init__(
        self,
        path: Path,
        *,
        dtype: torch.dtype | None = None,
        device: str | None = None,
        batch_size: int | None = None,
        max_length: int | None = None,
        tokenizer_model: str | None = None,
    ) -> None:
        """
        Args:
            path: a run directory, a checkpoint of any layout, or an export.
            dtype: of the weights; None is what is stored.
            device: None is this process's GPU where there is one.
            batch_size: as many tokens at once as so many sequences of `max_length` have; None is 8 of them on a GPU,
                and 1,024 tokens on a CPU.
            max_length: None is the trained context.
        Raises:
            CheckpointError, HFError: `path` cannot be used.
        """
        self.rank, self.world_size = _start_processes()
        if device is None:
            device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
        loaded = load(path, dtype=dtype, device=device, tokenizer_model=tokenizer_model)
        self.model, self.tokenizer, self.end = loaded.model, loaded.tokenizer, loaded.end
        self.max_length = max_length or loaded.model.config.max_position_embeddings
        self.source = source_of(path, loaded.model.config.family, loaded.model.config.depth)
        self._held = (batch_size or BATCH_SIZE) * self.max_length
        on_cpu = self.model.device.type == "cpu" and batch_size is None
        self._budget = min(CPU_TOKENS, self._held) if on_cpu else self._held

    @torch.inference_mode()
    def score(self, sequences: Sequence[Sequence[int]], first: Sequence[int]) -> Iterator[tuple[int, Scored]]:
        """See `Engine`. A prefix that sequences share is computed once, and its states are copied to each."""
        for batch in scoring_batches(sequences, first, self._budget):
            cache, prefix = self._of_prefixes(batch.prefixes), len(batch.prefixes[0])
            rests = [(index, row, sequences[index][prefix:-1]) for index, row in batch.rows]
            # A row computes its rest, and holds the states of its prefix too.
            share = self._budget / self._held
            for chunk in by_length(
                [max(len(rest), int((prefix + len(rest)) * share)) for *_, rest in rests], self._budget
            ):
                rows = [rests[i] for i in chunk]
                # Of tokens before the first that is wanted, the last layers need compute nothing.
                skipped = min(first[index] - 1 - prefix for index, *_ in rows)
                ids = padded([rest for *_, rest in rows])
                hidden = self._hidden(ids, _copied(cache, [row for _, row, _ in rows]), ids.shape[1] - skipped)
                wanted = [range(first[index] - 1 - prefix - skipped, len(rest) - skipped) for index, _, rest in rows]
                targets = [sequences[index][first[index] :] for index, *_ in rows]
                scores = self._scores(hidden, wanted, targets)
                yield from zip([index for index, *_ in rows], scores, strict=True)

    def _of_prefixes(self, prefixes: Sequence[Sequence[int]]) -> ArchScaleCache | None:
        if not prefixes[0]:
            return None
        cache = ArchScaleCache()
        self._hidden(padded(prefixes), cache, 1)
        return cache

    def _hidden(self, ids: Tensor, cache: ArchScaleCache | None, last: int) -> Tensor:
        """[b, last, hidden]. What is padded on the right is not masked: nothing before it sees it."""
        return self.model.model(
            ids.to(self.model.device), past_key_values=cache, use_cache=cache is not None, tokens_to_keep=last
        ).last_hidden_state

    def _scores(self, hidden: Tensor, positions: Sequence[range], targets: Sequence[Sequence[int]]) -> Iterator[Scored]:
        """Of each row, for the tokens behind `positions`. The logits of few positions are there at a time."""
        places = [row * hidden.shape[1] + position for row, wanted in enumerate(positions) for position in wanted]
        states = hidden.flatten(0, 1)[torch.tensor(places, device=hidden.device)]
        tokens = torch.tensor([token for row in targets for token in row], device=hidden.device)
        logprobs, greedy = [], []
        for part, expected in zip(states.split(rows := self._rows()), tokens.split(rows), strict=True):
            logits = self.model.lm_head(part).float()
            chosen = logits.gather(-1, expected[:, None]).squeeze(-1)
            logprobs.append(chosen - logits.logsumexp(-1))
            greedy.append(logits.argmax(-1) == expected)
        lengths = [len(row) for row in targets]
        parts = zip(torch.cat(logprobs).cpu().split(lengths), torch.cat(greedy).cpu().split(lengths), strict=True)
        return (Scored(*part) for part in parts)

    def _rows(self) -> int:
        return max(1, LOGITS // self.model.config.vocab_size)

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, numbers: Sequence[int] | None = None
    ) -> Iterator[tuple[int, Generated]]:
        """See `Engine`. Rows that have ended leave the batch; a prompt that occurs again is read once."""
        if not all(prompts):
            raise ValueError("a prompt has no tokens; give at least one")
        lengths = [len(prompt) + sampling.max_new_tokens for prompt in prompts]
        for batch in by_length(lengths, max(self._budget, max(lengths, default=0))):
            yield from self._continued({index: prompts[index] for index in batch}, sampling, numbers)

    def _continued(
        self, prompts: dict[int, Sequence[int]], sampling: Sampling, numbers: Sequence[int] | None
    ) -> Iterator[tuple[int, Generated]]:
        device = self.model.device
        unique = list(dict.fromkeys(map(tuple, prompts.values())))
        mask = padded([[1] * len(prompt) for prompt in unique], left=True).to(device)
        cache = ArchScaleCache()
        logits = self.model(padded(unique, left=True).to(device), mask, cache, logits_to_keep=1).logits[:, -1]
        texts = [Text(self, index, prompt, sampling, numbers) for index, prompt in prompts.items()]
        rows = torch.tensor([unique.index(tuple(prompt)) for prompt in prompts.values()], device=device)
        while True:
            cache.reorder_cache(rows)
            mask, logits = mask[rows], logits[rows]
            chosen = draw(logits, sampling, [text.generator for text in texts])
            going = [
                row for row, (text, token) in enumerate(zip(texts, chosen.tolist(), strict=True)) if text.add(token)
            ]
            yield from ((text.index, text.generated()) for row, text in enumerate(texts) if row not in going)
            if not going:
                return
            texts, rows = [texts[row] for row in going], torch.tensor(going, device=device)
            cache.reorder_cache(rows)
            mask = torch.nn.functional.pad(mask[rows], (0, 1), value=1)
            logits = self.model(chosen[rows][:, None], mask, cache, logits_to_keep=1).logits[:, -1]
            rows = torch.arange(len(texts), device=device)


class Text:
    """One prompt's continuation as it grows."""

    def __init__(
        self,
        engine: Any,
        index: int,
        prompt: Sequence[int],
        sampling: Sampling,
        numbers: Sequence[int] | None = None,
    ) -> None:
        self.index, self.ids, self._text = index, [], ""  # type: int, list[int], str
        self.generator = generator(sampling.seed, index if numbers is None else numbers[index])
        self._sampling, self._end, self._ended = sampling, engine.end, False
        added = engine.tokenizer.get_added_vocab()
        self._stop_ids = {added[stop] for stop in sampling.stop if stop in added}
        self._decoder = Decoder(engine.tokenizer, list(prompt))

    def add(self, token: int) -> bool:
        """Whether it goes on behind `token`."""
        self.ids.append(token)
        before = len(self._text)
        if token in self._end or token in self._stop_ids:
            self._ended = True
        else:
            self._text += self._decoder.step(token)
            # A stop string may have begun earlier.
            starts = [self._text.find(stop, max(0, before - len(stop) + 1)) for stop in self._sampling.stop]
            if found := [start for start in starts if start >= 0]:
                self._text, self._ended = self._text[: min(found)], True
        return not self._ended and len(self.ids) < self._sampling.max_new_tokens

    def generated(self) -> Generated:
        return Generated(self.ids, self._text, self._ended)


def _copied(cache: ArchScaleCache | None, rows: list[int]) -> ArchScaleCache | None:
    """A cache whose row i is row rows[i]."""
    if cache is None:
        return None
    copy = ArchScaleCache()
    copy.seen, copy.states = cache.seen, dict(cache.states)
    copy.reorder_cache(torch.tensor(rows))
    return copy


def _start_processes() -> tuple[int, int]:
    """Rank and number of torchrun's processes, which then can exchange objects."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")
    return rank, size
