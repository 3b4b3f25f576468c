"""RULER's needles in a haystack (arXiv 2404.06654, table 2 and appendix B): items of any length.

Templates, haystacks and numbers of needles are those of RULER and of lm-eval's tasks of these names. Unlike there, the
length covers the whole prompt, a context is filled to the last unit that fits, keys and values differ within an item,
and keys are made of our own words.
"""

from __future__ import annotations

import bisect
import random
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from archscale_megatron.evaluation.contexts import Item, fill, spread
from archscale_megatron.evaluation.words import ADJECTIVES, NOUNS, pairs

NEW_TOKENS = 128
DEPTHS = 40  # from the start of the context to its end

REPEATED = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
ONE = (
    "A special magic {one} is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "{one} afterwards.\n{context}\nWhat is the special magic {one} for {query} mentioned in the provided text? "
    "The special magic {one} for {query} mentioned in the provided text is"
)
SEVERAL = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the {kind} afterwards.\n{context}\nWhat are all the special magic {kind} for {query} mentioned in the provided "
    "text? The special magic {kind} for {query} mentioned in the provided text are"
)


@dataclass(frozen=True)
class Task:
    """
    Attributes:
        haystack: "repeat" (one line again and again), "essay" (a text) or "needle" (needles that nobody asks for).
        keys, values: "words", "numbers" or "uuids".
        num_keys: of needles among which are those asked for.
        num_values: a key.
        num_queries: keys asked for.
    """

    haystack: str
    keys: str = "words"
    values: str = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1


TASKS = {
    "niah_single_1": Task("repeat"),
    "niah_single_2": Task("essay"),
    "niah_single_3": Task("essay", values="uuids"),
    "niah_multikey_1": Task("essay", num_keys=4),
    "niah_multikey_2": Task("needle"),
    "niah_multikey_3": Task("needle", keys="uuids", values="uuids"),
    "niah_multivalue": Task("essay", num_values=4),
    "niah_multiquery": Task("essay", num_keys=4, num_queries=4),
}


class Haystack:
    """A text's words, again from its start behind its end, and where sentences start."""

    LONGEST = 100  # words of a sentence; what has no full stops is cut

    def __init__(self, text: str) -> None:
        """Raises ValueError if there is no word."""
        self._words = text.split()
        if not self._words:
            raise ValueError("the haystack has no words")
        self._starts = [0]
        for i, word in enumerate(self._words[:-1], 1):
            if word.rstrip("\"')]}\N{RIGHT DOUBLE QUOTATION MARK}").endswith((".", "!", "?")) or (
                i - self._starts[-1] >= self.LONGEST
            ):
                self._starts.append(i)

    def words(self, first: int, last: int) -> str:
        """Words first to last - 1."""
        length = len(self._words)
        copies = self._words if last <= length else self._words * -(-last // length)
        return " ".join(copies[first:last])

    def at(self, depth: float, words: int) -> int:
        """Where the sentence starts before which there are `depth` of the sentences of the first `words` words."""
        whole, rest = divmod(words, len(self._words))
        sentences = whole * len(self._starts) + bisect.bisect_left(self._starts, rest)
        copy, sentence = divmod(int(sentences * depth), len(self._starts))
        return min(copy * len(self._words) + self._starts[sentence], words) if depth < 1 else words


def item(
    task: str,
    length: int,
    seed: int,
    index: int,
    *,
    tokenizer: Any,
    haystack: Haystack | None = None,
    new_tokens: int = NEW_TOKENS,
) -> Item:
    """Item `index`, the same whenever it is made.

    Args:
        length: tokens of the prompt, special ones included, and `new_tokens` of the answer.
        haystack: of the tasks whose haystack is "essay".
    Raises:
        ValueError: the length leaves no place for the needles.
    """
    of = TASKS[task]
    rng = random.Random(f"{task} {length} {seed} {index}")
    keys, values = _distinct(of.keys, rng), _distinct(of.values, rng)

    def needle(key: str) -> tuple[str, str]:
        value = next(values)
        return NEEDLE.format(kind=of.values, key=key, value=value), value

    asked = [next(keys) for _ in range(of.num_queries)]
    others = [next(keys) for _ in range(of.num_keys - of.num_queries)]
    needles = [needle(key) for key in asked + others for _ in range(of.num_values)]
    answers = tuple(value for _, value in needles[: of.num_queries * of.num_values])
    first = int(spread(seed, index) * DEPTHS)
    steps = [first, *rng.sample([step for step in range(DEPTHS) if step != first], len(needles) - 1)]
    depths = [step / (DEPTHS - 1) for step in steps]
    hidden = sorted(zip(depths, (sentence for sentence, _ in needles), strict=True))
    query = ", ".join(asked[:-1]) + ", and " + asked[-1] if len(asked) > 1 else asked[0]
    distractors: list[str] = []

    def context(units: int) -> str:
        if of.haystack == "essay":
            assert haystack is not None
            pieces, last = [], 0
            for depth, sentence in hidden:
                at = haystack.at(depth, units)
                pieces += [haystack.words(last, at), sentence]
                last = at
            return " ".join(filter(None, [*pieces, haystack.words(last, units)]))
        while of.haystack == "needle" and len(distractors) < units:
            distractors.append(needle(next(keys))[0])
        lines = [REPEATED] * units if of.haystack == "repeat" else distractors[:units]
        for depth, sentence in reversed(hidden):
            lines.insert(int(units * depth), sentence)
        return "\n".join(lines)

    template = ONE if len(answers) == 1 else SEVERAL

    def prompt(units: int) -> str:
        return template.format(kind=of.values, one=of.values[:-1], query=query, context=context(units))

    try:
        units, ids = fill(prompt, tokenizer, length - new_tokens, least=1)
    except ValueError as error:
        raise ValueError(f"{task} does not fit into {length} tokens with {new_tokens} of the answer: {error}") from None
    return Item(ids, answers, tuple(depths[: len(answers)]), units)


def hits(text: str, item: Item) -> list[bool]:
    """Which answers a continuation contains, in any case of letters; RULER's `string_match_all` is their mean."""
    return [answer.lower() in text.lower() for answer in item.answers]


def _distinct(kind: str, rng: random.Random) -> Iterator[str]:
    """Keys or values that differ from each other."""
    if kind == "words":
        yield from pairs(rng, ADJECTIVES, NOUNS, "-")
        raise ValueError("there are no more words for keys")
    seen: set[str] = set()
    while True:
        number = kind == "numbers"
        one = str(rng.randrange(10**6, 10**7) if number else uuid.UUID(int=rng.getrandbits(128), version=4))
        if one not in seen:
            seen.add(one)
            yield one
