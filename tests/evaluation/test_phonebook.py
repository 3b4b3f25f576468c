"""The phone book: what an item is, seen from its text."""

import re
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from archscale_megatron.evaluation import phonebook
from archscale_megatron.evaluation.phonebook import hits, item
from archscale_megatron.evaluation.words import FIRST_NAMES, LAST_NAMES
from tests.evaluation.answering import Stutter


@settings(deadline=None, max_examples=60)
@given(
    size=st.integers(160, 3000),
    seed=st.integers(0, 99),
    index=st.integers(0, 99),
    start=st.booleans(),
    by_entries=st.booleans(),
)
def test_item(bpe: Any, bpe_with_start: Any, size: int, seed: int, index: int, start: bool, by_entries: bool) -> None:
    tokenizer = bpe_with_start if start else bpe
    if by_entries:
        size //= 20
    made = item(size, seed, index, tokenizer=tokenizer, by_entries=by_entries)
    text = tokenizer.decode(made.ids, skip_special_tokens=True)
    assert made.ids == tokenizer(text).input_ids
    book, shown, question = text.split("\n\n")
    entries = [re.fullmatch(r"([A-Z]\S+ [A-Z]\S+): ([6-9]\d{9})", line).groups() for line in book.split("\n")]
    assert len(entries) == made.units == len(dict(entries)) == len({number for _, number in entries})
    if by_entries:
        assert made.units == size
    else:
        assert size - 30 < len(made.ids) + 20 <= size
    name = question.removesuffix(":")
    assert question == f"{name}:" and made.answers == (dict(entries)[name],)
    first, second = (tuple(line.split(": ")) for line in shown.split("\n"))
    assert first != second and {first, second} < set(entries) and name not in (first[0], second[0])
    place = [one for one, _ in entries].index(name)
    assert made.depths == (pytest.approx(place / (len(entries) - 1)),)
    assert made == item(size, seed, index, tokenizer=tokenizer, by_entries=by_entries)


def test_what_was_drawn_twice_is_there_once(bpe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phonebook.random, "Random", Stutter)
    book = bpe.decode(item(50, 0, 0, tokenizer=bpe, by_entries=True).ids).split("\n\n")[0]
    names, numbers = zip(*(line.split(": ") for line in book.split("\n")), strict=True)
    assert len(set(names)) == len(set(numbers)) == 50


def test_places_are_spread_over_the_book(bpe: Any) -> None:
    depths = [item(100, 3, i, tokenizer=bpe, by_entries=True).depths[0] for i in range(50)]
    assert len(set(depths)) == 50
    assert [sum(int(depth * 9.99) == tenth for depth in depths) for tenth in range(10)] == pytest.approx(
        [5] * 10, abs=2
    )


def test_as_many_names_as_there_are(bpe: Any) -> None:
    assert len(FIRST_NAMES) * len(LAST_NAMES) > 100_000
    assert item(12_000, 0, 0, tokenizer=bpe, by_entries=True).units == 12_000


@pytest.mark.parametrize(("size", "by_entries", "message"), [
    (40, False, r"does not fit into 40 tokens: its shortest prompt has \d+ tokens"),
    (2, True, "does not fit into 2 entries: it needs 3"),
    (26, True, "does not fit into 26 entries: there are 25 different names"),
    (1000, False, "does not fit into 1000 tokens: there are 25 different names"),
])  # fmt: skip
def test_impossible(bpe: Any, monkeypatch: pytest.MonkeyPatch, size: int, by_entries: bool, message: str) -> None:
    for names in ("FIRST_NAMES", "LAST_NAMES"):
        monkeypatch.setattr(phonebook, names, ["Ann", "Bob", "Carl", "Dee", "Eve"])
    with pytest.raises(ValueError, match=message):
        item(size, 0, 0, tokenizer=bpe, by_entries=by_entries)


@pytest.mark.parametrize(("text", "right"), [
    (" 7136202294", True), ("7136202294\nAnn Lee: 1", True), (" 7136202294 \n", True), ("\n7136202294", False),
    (" 71362022940", False), (" 713620229", False), ("is 7136202294", False), ("", False),
])  # fmt: skip
def test_hits(text: str, right: bool) -> None:
    assert hits(text, SimpleNamespace(answers=("7136202294",))) == [right]  # type: ignore[arg-type]
