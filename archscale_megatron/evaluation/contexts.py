"""Prompts as long as asked, which hide what is asked for."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

GOLDEN = (5**0.5 - 1) / 2  # its multiples fill [0, 1) evenly, however many there are


@dataclass(frozen=True)
class Item:
    """
    Attributes:
        ids: of the prompt, as the tokenizer makes them of the whole of it.
        answers: what the continuation must say.
        depths: of each answer in the context, 0 at its start and 1 at its end.
        units: of the haystack, or entries of the book.
    """

    ids: list[int]
    answers: tuple[str, ...]
    depths: tuple[float, ...]
    units: int


def encode(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text as in training: the tokenizer adds what it adds."""
    return tokenizer(text, verbose=False).input_ids


def spread(seed: int, index: int) -> float:
    """A depth in [0, 1) for item `index`: those of any number of items are spread evenly."""
    return (random.Random(f"depth {seed}").random() + index * GOLDEN) % 1


def fill(text: Callable[[int], str], tokenizer: Any, limit: int, least: int) -> tuple[int, list[int]]:
    """As many units as fit into `limit` tokens: with one more there would be more tokens than that.

    The whole text is tokenized each time, some five times however long it is: tokens are nearly proportional to
    units, so the search goes where the limit would be if they were.

    Args:
        text: of a number of units.
        least: number of units below which it makes no sense.
    Returns:
        The number of units, and the ids of their text.
    Raises:
        ValueError: not even `least` units fit; says how many tokens they are.
    """
    fits, ids = least, encode(tokenizer, text(least))
    if len(ids) > limit:
        raise ValueError(f"its shortest prompt has {len(ids)} tokens")
    rate = (len(encode(tokenizer, text(least + 16))) - len(ids)) / 16
    beyond = None
    while beyond is None or beyond - fits > 1:
        units = fits + max(1, int((limit - len(ids)) / max(rate, 0.1)))
        if beyond is not None:
            units = min(units, beyond - 1)
        tried = encode(tokenizer, text(units))
        if units - fits >= 16:
            rate = (len(tried) - len(ids)) / (units - fits)
        if len(tried) <= limit:
            fits, ids = units, tried
        else:
            beyond = units
    return fits, ids
