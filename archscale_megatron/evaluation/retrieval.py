"""What needles and phone books have in common: items are asked, what was said is noted, and told by length, seed and
depth."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from archscale_megatron.checkpoint import agreement
from archscale_megatron.evaluation.contexts import Item
from archscale_megatron.evaluation.engine import Engine, Sampling
from archscale_megatron.evaluation.journal import Journal
from archscale_megatron.evaluation.report import Score

AT_ONCE = 1 << 18  # tokens of prompts that a rank holds
LEAST_AT_ONCE = 8  # prompts
BINS = 10  # of depths
SHOWN = 3  # answers of a group that the report keeps


@dataclass(frozen=True)
class Question:
    """One item to be.

    Attributes:
        group: the score to which it belongs, `task@size`.
        size: tokens or entries.
        tokens: no more than these, the answer included.
    """

    group: str
    size: int
    seed: int
    index: int
    tokens: int

    @property
    def key(self) -> str:
        """Its name in the journal."""
        return f"{self.group}/{self.seed}/{self.index}"


def ask(
    engine: Engine,
    questions: Sequence[Question],
    make: Callable[[Question], Item],
    hits: Callable[[str, Item], list[bool]],
    sampling: Sampling,
    journal: Journal,
) -> None:
    """Put into the journal, of every question that is not there, {"hits", "depths", "units", "tokens", "text",
    "answers"}. All ranks call it, and each asks its share of the questions."""
    from tqdm import tqdm

    pending = [question for question in questions if question.key not in journal.done]
    rank, size = agreement.rank_and_size()
    with tqdm(
        total=len(questions), initial=len(questions) - len(pending), unit="item", disable=rank > 0 or None
    ) as bar:
        for portion in _portions(pending, engine.world_size):
            mine = portion[engine.rank :: engine.world_size]
            items = [make(question) for question in mine]
            found = {}
            for i, generated in engine.generate([item.ids for item in items], sampling) if items else ():
                found[mine[i].key] = _record(items[i], generated.text, hits)
                if size == 1:
                    journal.append(mine[i].key, found[mine[i].key])
                bar.update(engine.world_size)
            if size > 1:  # ranks that compute one model together have found the same
                for key, record in {k: r for each in agreement.of_all_ranks(found) for k, r in each.items()}.items():
                    journal.append(key, record)


def _portions(questions: Sequence[Question], ranks: int) -> Iterator[Sequence[Question]]:
    first, tokens = 0, 0
    for i, question in enumerate(questions):
        if tokens + question.tokens > AT_ONCE * ranks and i - first >= LEAST_AT_ONCE * ranks:
            yield questions[first:i]
            first, tokens = i, 0
        tokens += question.tokens
    yield questions[first:]


def _record(item: Item, text: str, hits: Callable[[str, Item], list[bool]]) -> dict[str, Any]:
    return {
        "hits": hits(text, item),
        "depths": list(item.depths),
        "units": item.units,
        "tokens": len(item.ids),
        "text": text,
        "answers": list(item.answers),
    }


def summary(
    questions: Iterable[Question], done: Mapping[str, Any], metric: str
) -> tuple[dict[str, Score], dict[str, Any]]:
    """Score of each group, and about it: {"tokens": mean of the prompts, "units": mean, "seeds": {seed: score},
    "deviation": of the scores of the seeds (None of one), "depths": [[score, answers] of each tenth of the context],
    "shown": [{"answers", "text"}]}."""
    scores, details = {}, {}
    groups: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for question in questions:
        groups.setdefault(question.group, {}).setdefault(question.seed, []).append(done[question.key])
    for name, seeds in groups.items():
        records = [record for one in seeds.values() for record in one]
        values = [statistics.mean(record["hits"]) for record in records]
        by_seed = {
            seed: statistics.mean(statistics.mean(record["hits"]) for record in one) for seed, one in seeds.items()
        }
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
        scores[name] = Score(statistics.mean(values), error, len(values), metric)
        details[name] = {
            "tokens": round(statistics.mean(record["tokens"] for record in records)),
            "units": round(statistics.mean(record["units"] for record in records)),
            "seeds": by_seed,
            "deviation": statistics.stdev(by_seed.values()) if len(by_seed) > 1 else None,
            "depths": _by_depth(records),
            "shown": [{"answers": record["answers"], "text": record["text"]} for record in records[:SHOWN]],
        }
    return scores, details


def _by_depth(records: list[dict[str, Any]]) -> list[list[Any]]:
    bins: list[list[bool]] = [[] for _ in range(BINS)]
    for record in records:
        for hit, depth in zip(record["hits"], record["depths"], strict=True):
            bins[min(int(depth * BINS), BINS - 1)].append(hit)
    return [[statistics.mean(one) if one else None, len(one)] for one in bins]
