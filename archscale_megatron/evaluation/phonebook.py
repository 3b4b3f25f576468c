"""The phone book (arXiv 2402.01032; ArchScale's eval_phonebook.py): names and numbers, and one name asked for again.

Ann Lee: 7136202294            entries, each name once
...
(blank line)
Ann Lee: 7136202294            two of them, that show what is asked for
Bob Hill: 9001231230
(blank line)
Carl Wood:
"""

from __future__ import annotations

import random
from typing import Any

from archscale_megatron.evaluation.contexts import Item, encode, fill, spread
from archscale_megatron.evaluation.words import FIRST_NAMES, LAST_NAMES, pairs

NEW_TOKENS = 20
LEAST = 3  # entries: the two that are shown, and the one asked for


def item(
    size: int, seed: int, index: int, *, tokenizer: Any, by_entries: bool = False, new_tokens: int = NEW_TOKENS
) -> Item:
    """Item `index`, the same whenever it is made.

    Args:
        size: tokens of the prompt and of the answer, or number of entries if `by_entries`.
    Raises:
        ValueError: the size leaves no place for three entries, or there are fewer names.
    """
    kind = "entries" if by_entries else "tokens"
    rng = random.Random(f"phonebook {size} {kind} {seed} {index}")
    names, numbers, entries = pairs(rng, FIRST_NAMES, LAST_NAMES, " "), set[str](), list[tuple[str, str]]()
    shown = [rng.random(), rng.random()]
    depth = spread(seed, index)

    def grow(count: int) -> None:
        while len(entries) < count:
            number = str(rng.randrange(6 * 10**9, 10**10))
            if number not in numbers:
                numbers.add(number)
                name = next(names, None)
                if name is None:
                    raise ValueError(f"there are {len(entries):,} different names")
                entries.append((name, number))

    def prompt(count: int) -> str:
        grow(count)
        asked = int(depth * count)
        others = [*range(asked), *range(asked + 1, count)]
        first = others.pop(int(shown[0] * len(others)))
        second = others[int(shown[1] * len(others))]
        lines = [f"{name}: {number}" for name, number in entries[:count]]
        return "\n".join([*lines, "", lines[first], lines[second], "", f"{entries[asked][0]}:"])

    try:
        if by_entries:
            if size < LEAST:
                raise ValueError(f"it needs {LEAST}")
            count, ids = size, encode(tokenizer, prompt(size))
        else:
            count, ids = fill(prompt, tokenizer, size - new_tokens, LEAST)
    except ValueError as error:
        raise ValueError(f"a phone book does not fit into {size} {kind}: {error}") from None
    asked = int(depth * count)
    return Item(ids, (entries[asked][1],), (asked / (count - 1),), count)


def hits(text: str, item: Item) -> list[bool]:
    """Whether the first line of a continuation is the number."""
    return [text.split("\n")[0].strip() == answer for answer in item.answers]
