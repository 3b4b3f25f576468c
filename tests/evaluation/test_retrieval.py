"""Engines of which one knows what they must score are asked; what they said is told by seed and by depth."""

import math
import statistics
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from archscale_megatron.evaluation import needles, phonebook, retrieval
from archscale_megatron.evaluation.contexts import Item
from archscale_megatron.evaluation.engine import Sampling
from archscale_megatron.evaluation.journal import Journal
from archscale_megatron.evaluation.retrieval import Question, ask, summary
from tests.evaluation.answering import Copying, Random, Texts, oracle

HAYSTACK = needles.Haystack("The essay says so. " * 50 + "It has been said. ")
Groups = dict[str, list[int]]


def score(path: Path, engine: Any, groups: Groups, samples: int = 4, seeds: int = 2, journal: Any = None) -> Any:
    """Scores and details of groups: sizes of each task."""
    questions = [
        Question(f"{task}@{size}", size, seed, index, size)
        for task, sizes in groups.items()
        for size in sizes
        for seed in range(seeds)
        for index in range(samples)
    ]
    journal = journal or Journal(path / "report.json", {})
    of_book = next(iter(groups)) == "phonebook"
    budget = phonebook.NEW_TOKENS if of_book else needles.NEW_TOKENS
    hits = phonebook.hits if of_book else needles.hits
    ask(engine, questions, maker(engine.tokenizer), hits, Sampling(budget, stop=("\n",) if of_book else ()), journal)
    return summary(questions, journal.done, "metric")


def maker(tokenizer: Any) -> Callable[[Question], Item]:
    """Items of both kinds."""

    def make(one: Question) -> Item:
        task = one.group.partition("@")[0]
        if task == "phonebook":
            return phonebook.item(one.size, one.seed, one.index, tokenizer=tokenizer)
        return needles.item(task, one.size, one.seed, one.index, tokenizer=tokenizer, haystack=HAYSTACK)

    return make


NEEDLES: Groups = {task: [800, 1200] for task in needles.TASKS}
BOOKS: Groups = {"phonebook": [300, 700, 1500]}


@pytest.mark.parametrize("groups", [NEEDLES, BOOKS], ids=["needles", "phonebook"])
def test_who_knows_scores_100_and_who_guesses_0(bpe: Any, tmp_path: Path, groups: Groups) -> None:
    for engine, expected in ((Texts(bpe, oracle), 1.0), (Random(bpe), 0.0)):
        scores, details = score(tmp_path / type(engine).__name__, engine, groups)
        assert len(scores) == sum(map(len, groups.values()))
        for name, one in scores.items():
            assert (one.value, one.stderr, one.n, one.metric) == (expected, 0.0, 8, "metric"), name
            assert details[name]["seeds"] == {0: expected, 1: expected} and details[name]["deviation"] == 0
            assert int(name.partition("@")[2]) - 270 < details[name]["tokens"] < int(name.partition("@")[2])


@pytest.mark.parametrize("groups", [NEEDLES, BOOKS], ids=["needles", "phonebook"])
def test_who_knows_some_names_scores_their_part(bpe: Any, tmp_path: Path, groups: Groups) -> None:
    def knows(name: str) -> bool:
        return len(name) % 2 == 0

    def answer(prompt: str) -> str:
        return oracle(prompt, knows)

    scores, details = score(tmp_path, Texts(bpe, answer), groups, samples=6)
    make = maker(bpe)
    for name, one in scores.items():
        size = int(name.partition("@")[2])
        known: list[float] = []
        for seed in range(2):
            for index in range(6):
                text = bpe.decode(make(Question(name, size, seed, index, size)).ids)
                question = text.rpartition("\n")[2]
                names = (
                    question.partition(" for ")[2].partition(" mentioned")[0].replace(" and ", " ").split(", ")
                    if "special magic" in text
                    else [question.removesuffix(":")]
                )
                known.append(statistics.mean(knows(each) for each in names))
        assert one.value == pytest.approx(statistics.mean(known))
        assert one.stderr == pytest.approx(statistics.stdev(known) / math.sqrt(12))
        halves = [statistics.mean(known[:6]), statistics.mean(known[6:])]
        assert list(details[name]["seeds"].values()) == pytest.approx(halves)
        assert details[name]["deviation"] == pytest.approx(statistics.stdev(halves))
    assert 0.2 < statistics.mean(one.value for one in scores.values()) < 0.8


def test_who_reads_the_start_only(bpe: Any, tmp_path: Path) -> None:
    """Half of the book: right above, wrong below, and the details say so."""

    def answer(prompt: str) -> str:
        book = prompt.split("\n\n")[0].split("\n")
        name = prompt.rpartition("\n")[2].removesuffix(":")
        return dict(line.split(": ") for line in book[: len(book) // 2]).get(name, "unknown")

    _, details = score(tmp_path, Texts(bpe, answer), {"phonebook": [1500]}, samples=50, seeds=1)
    depths = details["phonebook@1500"]["depths"]
    assert [value for value, _ in depths[:5]] == [1.0] * 5 and [value for value, _ in depths[5:]] == [0.0] * 5
    assert sum(count for _, count in depths) == 50 and min(count for _, count in depths) >= 3
    assert details["phonebook@1500"]["deviation"] is None


def test_a_model_that_can_copy_reads_the_phone_book(bpe: Any, tmp_path: Path) -> None:
    scores, _ = score(tmp_path, Copying(bpe), {"phonebook": [400, 2000]}, samples=6)
    assert [one.value for one in scores.values()] == [1.0, 1.0]


class Killed(Exception):
    """Stands for kill -9."""


def test_goes_on_after_a_kill(bpe: Any, tmp_path: Path) -> None:
    whole, _ = score(tmp_path / "whole", Texts(bpe, oracle), BOOKS)
    told = []

    def answer(prompt: str) -> str:
        if len(told) == 10:
            raise Killed
        told.append(prompt)
        return oracle(prompt)

    with pytest.raises(Killed):
        score(tmp_path, Texts(bpe, answer), BOOKS)
    again = Texts(bpe, oracle)
    journal = Journal(tmp_path / "report.json", {})
    assert len(journal.done) == 10
    scores, _ = score(tmp_path, again, BOOKS, journal=journal)
    assert scores == whole and len(again.prompts) == 24 - 10
    assert not {tuple(bpe(prompt).input_ids) for prompt in told} & set(map(tuple, again.prompts))


def test_ranks_share_the_work(bpe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads stand for two processes: each asks its own half of each portion, and both know all."""
    scores, _ = score(tmp_path, Texts(bpe, oracle), BOOKS)
    monkeypatch.setattr(retrieval, "AT_ONCE", 1000)
    monkeypatch.setattr(retrieval, "LEAST_AT_ONCE", 1)
    here, meeting = threading.local(), threading.Barrier(2, timeout=30)
    found: list[Any] = [None, None]
    portions = []

    def of_all_ranks(value: Any) -> list[Any]:
        found[here.rank] = value
        meeting.wait()
        both = list(found)
        portions.append([len(one) for one in both])
        meeting.wait()
        return both

    monkeypatch.setattr(retrieval.agreement, "rank_and_size", lambda: (here.rank, 2))
    monkeypatch.setattr(retrieval.agreement, "of_all_ranks", of_all_ranks)
    engines = [Texts(bpe, oracle), Texts(bpe, oracle)]

    def run(rank: int) -> Any:
        here.rank, engines[rank].rank, engines[rank].world_size = rank, rank, 2
        done: dict[str, Any] = {}
        return score(tmp_path, engines[rank], BOOKS, journal=SimpleNamespace(done=done, append=done.__setitem__))[0]

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, (0, 1))) == [scores, scores]
    assert len(portions) > 10 and sum(map(sum, portions)) == 2 * 24
    assert [len(engine.prompts) for engine in engines] == [12, 12]
