"""Engines of which one knows what they must score: those that know the answer, one that can only copy, and one that
says anything."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from archscale_megatron.evaluation.engine import Generated, Sampling

SOURCE = {"path": "nowhere", "iteration": 0, "fingerprint": "0", "architecture": "by hand"}


def tokenizer(directory: Path, start: bool = False) -> Any:
    """Of a directory; with `start` it puts a token before each text, as Llama's does."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    made = AutoTokenizer.from_pretrained(directory)
    if start:
        made.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|start|> $A", special_tokens=[("<|start|>", made.convert_tokens_to_ids("<|start|>"))]
        )
    return made


class Stutter(random.Random):
    """Draws each whole number between the same limits twice."""

    def randrange(self, *limits: Any) -> int:
        """The last one, or a new one, in turn."""
        last = self.__dict__.setdefault("last", {})
        if limits in last:
            return last.pop(limits)
        last[limits] = super().randrange(*limits)
        return last[limits]


class Texts:
    """An engine whose answers are a function of the prompt's text. They come last to first."""

    end = ()
    rank, world_size = 0, 1

    def __init__(self, tokenizer: Any, answer: Callable[[str], str], max_length: int = 1 << 20) -> None:
        self.tokenizer, self.answer, self.max_length, self.source = tokenizer, answer, max_length, SOURCE
        self.prompts: list[list[int]] = []

    def score(self, sequences: Any, first: Any) -> Any:
        """Not for these."""
        raise AssertionError

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[tuple[int, Generated]]:
        """As an engine."""
        for index in reversed(range(len(prompts))):
            assert len(prompts[index]) + sampling.max_new_tokens <= self.max_length
            self.prompts.append(list(prompts[index]))
            ids = self.tokenizer(self.answer(self.tokenizer.decode(prompts[index], skip_special_tokens=True))).input_ids
            yield index, self._cut(ids[: sampling.max_new_tokens], sampling)

    def _cut(self, ids: list[int], sampling: Sampling) -> Generated:
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        ends = [text.find(stop) for stop in sampling.stop if stop in text]
        return Generated(ids, text[: min(ends)] if ends else text, bool(ends))


def oracle(prompt: str, knows: Callable[[str], bool] = lambda name: True) -> str:
    """The right answer, read off the prompt, as far as one knows the names asked for."""
    if "special magic" not in prompt:
        book, _, _ = prompt.partition("\n\n")
        name = prompt.rpartition("\n")[2].removesuffix(":")
        return f" {dict(line.split(': ') for line in book.splitlines())[name]}\nAnn Lee: 1" if knows(name) else " 1\n"
    asked, beginning = re.findall(r" for (.+?) mentioned in the provided text", prompt)[-2:]
    assert asked == beginning
    names = re.split(r", and |, ", asked)
    needles = re.findall(r"One of the special magic \w+ for (\S+) is: ([0-9a-f-]+)\.", prompt)
    return " " + ", ".join(value for name in names if knows(name) for key, value in needles if key == name) + "."


class Random(Texts):
    """Says random tokens."""

    def __init__(self, tokenizer: Any, max_length: int = 1 << 20) -> None:
        super().__init__(tokenizer, self._anything, max_length)
        self._rng = random.Random(0)

    def _anything(self, prompt: str) -> str:
        return self.tokenizer.decode([self._rng.randrange(len(self.tokenizer)) for _ in range(128)])


class Induction(torch.nn.Module):
    """Attention of two layers whose weights are set by hand, that goes on as the text did where it was last the same.

    In the first layer head j looks j tokens back, so that a position knows the `reach` tokens up to it, each in a
    subspace of its own. In the second a position looks for the ones behind the same tokens, of which the nearer count
    twice the farther, so that the longest common suffix wins; and it says the token that is there.
    """

    def __init__(self, vocabulary: int, reach: int = 32, sharpness: float = 2.0**40) -> None:
        super().__init__()
        self.register_buffer("weights", 0.5 ** torch.arange(reach, dtype=torch.float64))
        self.vocabulary, self.sharpness = vocabulary, sharpness

    def forward(self, ids: Tensor) -> Tensor:
        """Logits [vocabulary] of the token behind ids [s]. Embeddings are unit vectors, which are not written out."""
        scores = torch.zeros(len(ids) - 1, dtype=torch.float64)
        for j, weight in enumerate(self.weights[: len(ids) - 1]):
            scores[j:] += weight * (ids[len(ids) - 1 - j] == ids[: len(ids) - 1 - j])
        attention = (self.sharpness * scores).softmax(0)
        return torch.zeros(self.vocabulary, dtype=torch.float64).index_add(0, ids[1:], attention)


class Copying(Texts):
    """The induction model, greedy; with a `window`, it sees so many tokens."""

    def __init__(self, tokenizer: Any, max_length: int = 1 << 20, window: int = 1 << 20) -> None:
        super().__init__(tokenizer, str, max_length)
        self.model, self.window = Induction(len(tokenizer)), window

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[tuple[int, Generated]]:
        """As an engine."""
        for index, prompt in enumerate(prompts):
            ids = torch.tensor(prompt)
            for _ in range(sampling.max_new_tokens):
                ids = torch.cat([ids, self.model(ids[-self.window :]).argmax()[None]])
            yield index, self._cut(ids[len(prompt) :].tolist(), sampling)
