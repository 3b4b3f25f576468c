"""Needles: what an item is, seen from its text; and the same prompts as lm-eval's own RULER."""

import itertools
import random
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from archscale_megatron.evaluation import needles
from archscale_megatron.evaluation.needles import DEPTHS, NEEDLE, REPEATED, TASKS, Haystack, hits, item
from tests.evaluation import ruler
from tests.evaluation.answering import Stutter, oracle

TEXT = " ".join(f"Sentence {i} of the essay says that {'more ' * (i % 7)}is to come." for i in range(300))
HAYSTACK = Haystack(TEXT)
KINDS = {
    "words": r"[a-z]+-[a-z]+",
    "numbers": r"[1-9]\d{6}",
    "uuids": r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}",
}
FACTS = {  # haystack, keys, values; keys in the essay, values a key, keys asked for
    "niah_single_1": ("repeat", "words", "numbers", 1, 1, 1),
    "niah_single_2": ("essay", "words", "numbers", 1, 1, 1),
    "niah_single_3": ("essay", "words", "uuids", 1, 1, 1),
    "niah_multikey_1": ("essay", "words", "numbers", 4, 1, 1),
    "niah_multikey_2": ("needle", "words", "numbers", 1, 1, 1),
    "niah_multikey_3": ("needle", "uuids", "uuids", 1, 1, 1),
    "niah_multivalue": ("essay", "words", "numbers", 1, 4, 1),
    "niah_multiquery": ("essay", "words", "numbers", 4, 1, 4),
}


def found_in(text: str) -> list[tuple[str, str]]:
    """Keys and values of all needles."""
    return re.findall(r"One of the special magic \w+ for (\S+) is: (\S+)\.", text)


@settings(deadline=None, max_examples=60)
@given(
    task=st.sampled_from(sorted(FACTS)),
    length=st.integers(600, 3000),
    seed=st.integers(0, 99),
    index=st.integers(0, 99),
    start=st.booleans(),
    budget=st.sampled_from([1, 128]),
)
def test_item(
    bpe: Any, bpe_with_start: Any, task: str, length: int, seed: int, index: int, start: bool, budget: int
) -> None:
    tokenizer = bpe_with_start if start else bpe
    made = item(task, length, seed, index, tokenizer=tokenizer, haystack=HAYSTACK, new_tokens=budget)
    haystack, keys_of, values_of, num_keys, num_values, num_queries = FACTS[task]
    text = tokenizer.decode(made.ids, skip_special_tokens=True)
    assert made.ids == tokenizer(text).input_ids

    largest_unit = {"repeat": 50, "essay": 12, "needle": 110}[haystack]
    assert length - largest_unit < len(made.ids) + budget <= length

    needles_there = found_in(text)
    keys = {key for key, _ in needles_there}
    expected = made.units + 1 if haystack == "needle" else num_keys * num_values
    assert len(needles_there) == expected and len(keys) == expected // num_values
    assert len({value for _, value in needles_there}) == expected
    assert all(re.fullmatch(KINDS[keys_of], key) for key in keys)
    assert all(re.fullmatch(KINDS[values_of], value) for _, value in needles_there)
    assert all(text.count(answer) == 1 for answer in made.answers)
    assert len(made.answers) == num_queries * num_values == len(made.depths) == len(set(made.depths))

    context = text.split("\n", 1)[1].rsplit("\nWhat ", 1)[0]
    hidden = [NEEDLE.format(kind=values_of, key=key, value=value) for key, value in needles_there]
    if haystack == "essay":
        of_essay = context
        for needle in hidden:
            of_essay = of_essay.replace(needle, "")
        words = TEXT.split()
        assert of_essay.split() == list(itertools.islice(itertools.cycle(words), made.units))
    elif haystack == "repeat":
        lines = context.split("\n")
        assert sorted(lines) == sorted([REPEATED] * made.units + hidden)
    for answer, depth in zip(made.answers, made.depths, strict=True):
        assert round(depth * (DEPTHS - 1), 6) % 1 == 0
        before = context[: context.index(answer)]
        if haystack == "essay":
            sentences = len(re.findall(r"\bSentence\b", context))
            assert abs(len(re.findall(r"\bSentence\b", before)) - depth * sentences) <= 1.001
        else:
            assert before.count("\n") == int(depth * made.units)


@pytest.mark.parametrize("task", FACTS)
def test_only_task_length_seed_and_index_count(bpe: Any, task: str) -> None:
    def of(**changed: Any) -> Any:
        given = {"task": task, "length": 900, "seed": 1, "index": 2} | changed
        return item(**given, tokenizer=bpe, haystack=HAYSTACK)

    assert of() == of()
    others = [of(), of(seed=2), of(index=3), of(length=901)]
    assert len({one.answers for one in others}) == 4


@pytest.mark.parametrize("kind", ["numbers", "words"])
def test_what_was_drawn_twice_is_there_once(kind: str) -> None:
    drawn = list(itertools.islice(needles._distinct(kind, Stutter(0)), 50))
    assert len(set(drawn)) == 50


def test_depths_reach_from_start_to_end(bpe: Any) -> None:
    depths = [
        item("niah_single_2", 600, 0, i, tokenizer=bpe, haystack=HAYSTACK, new_tokens=8).depths[0] for i in range(120)
    ]
    assert set(depths) == {step / 39 for step in range(40)}


@pytest.mark.parametrize("words", [1, 7, 10, 11, 29, 30])
def test_short_text_is_repeated(words: int) -> None:
    text = "One two three. Four five? Six 'seven eight nine!' ten"
    haystack, repeated = Haystack(text), text.split() * 3
    assert haystack.words(0, words) == " ".join(repeated[:words])
    assert haystack.words(2, words) == " ".join(repeated[2:words])
    starts = [i for i in range(words) if i % 10 in (0, 3, 5, 9)]
    for step in range(40):
        depth = step / 39
        assert haystack.at(depth, words) == ([*starts, words][int(len(starts) * depth)])


def test_a_text_without_full_stops_is_cut() -> None:
    haystack = Haystack("word " * 1000)
    assert [haystack.at(depth, 1000) for depth in (0, 0.25, 0.5, 1)] == [0, 200, 500, 1000]
    with pytest.raises(ValueError, match="no words"):
        Haystack(" \n")


def test_too_short(bpe: Any) -> None:
    message = r"niah_multikey_3 does not fit into 256 tokens with 128 of the answer: its shortest prompt has \d+ tokens"
    with pytest.raises(ValueError, match=message):
        item("niah_multikey_3", 256, 0, 0, tokenizer=bpe)


def test_hits() -> None:
    of = SimpleNamespace(answers=("1234567", "ab-CD"))
    assert hits(" are 1234567 and AB-cd.", of) == [True, True]  # type: ignore[arg-type]
    assert hits("12345670 abcd", of) == [True, False]  # type: ignore[arg-type]
    assert hits("", of) == [False, False]  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def of_lm_eval() -> Any:
    """lm-eval's own generator."""
    with ruler.installed(TEXT.split(" ")) as utils:
        random.seed(0)
        yield utils


@pytest.mark.parametrize("task", FACTS)
def test_prompts_are_those_of_lm_eval(of_lm_eval: Any, bpe: Any, bpe_directory: Path, task: str) -> None:
    """Head, tail and needles of the same form, and its answers are what our oracle reads off its prompts."""
    made = getattr(of_lm_eval, task)(max_seq_lengths=[1600], tokenizer=str(bpe_directory))["test"]
    ours = bpe.decode(item(task, 1600, 0, 0, tokenizer=bpe, haystack=HAYSTACK).ids)
    assert len(made) == ruler.ITEMS
    for one in made:
        theirs = f"{one['input']} {one['gen_prefix']}"
        assert sorted(re.findall(r"[0-9a-f-]{7,}", oracle(theirs))) == sorted(one["outputs"])
        assert skeleton(theirs, 0) == skeleton(ours, 0)
        assert skeleton(theirs, -1) == skeleton(ours, -1)
        kinds = [{re.sub(r"for \S+ is: \S+\.", "", needle) for needle in needles_of(text)} for text in (theirs, ours)]
        assert kinds[0] == kinds[1] and len(kinds[0]) == 1
        if TASKS[task].haystack != "needle":
            assert len(needles_of(theirs)) == len(needles_of(ours))
        if TASKS[task].haystack == "repeat":
            assert REPEATED in theirs.split("\n")


def needles_of(text: str) -> list[str]:
    """The sentences that are needles."""
    return re.findall(r"One of the special magic \w+ for \S+ is: \S+\.", text)


def skeleton(prompt: str, line: int) -> str:
    """A line of a prompt without its keys."""
    return re.sub("|".join([KINDS["uuids"], KINDS["words"]]), "KEY", prompt.split("\n")[line])


def test_tasks_are_all() -> None:
    assert set(TASKS) == set(FACTS)
    assert needles.NEW_TOKENS == 128
