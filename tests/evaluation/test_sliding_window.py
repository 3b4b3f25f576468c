"""Which tokens are scored with which context, and what their sums and errors are: against loops over tokens."""

import math
import threading
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from archscale_megatron.evaluation import sliding_window
from archscale_megatron.evaluation.journal import Journal
from archscale_megatron.evaluation.perplexity import evaluate
from archscale_megatron.evaluation.sliding_window import EDGES, Losses, Window, measure, windows_of
from archscale_megatron.evaluation.texts import Document
from tests.evaluation.engines import KnownEngine, PlainEngine
from tests.hf.models import architecture, build

LENGTHS = st.integers(0, 200)


def loss_of(token: int, context: int) -> float:
    """Tells token and context, and adds up without rounding."""
    return token * 1024.0 + context


def context_of(t: int, length: int, window: int, stride: int) -> int:
    """Tokens before token t, by the definition: windows end after `window`, `window` + `stride`, ... tokens, the last
    with the document, and the first that reaches a token scores it."""
    end = min(window, length)
    while end <= t:
        end = min(end + stride, length)
    return t - max(end - window, 0)


def document(length: int, first: int = 0) -> Document:
    return Document(np.arange(first, first + length), None)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(tmp_path / "a.json", {})
    yield journal
    journal.finish()


@given(length=LENGTHS, window=st.integers(2, 70), data=st.data())
@settings(max_examples=300, deadline=None)
def test_every_token_but_the_first_once(length: int, window: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, window - 1))
    contexts = {}
    for one in windows_of(3, length, window, stride):
        assert one.document == 3 and 0 <= one.begin < one.first < one.end <= length and one.end - one.begin <= window
        for t in range(one.first, one.end):
            assert t not in contexts
            contexts[t] = t - one.begin
    assert contexts == {t: context_of(t, length, window, stride) for t in range(1, length)}
    assert all(context >= min(t, window - stride) for t, context in contexts.items())


@given(length=LENGTHS, window=st.integers(2, 70), stride=st.integers(1, 69))
@settings(max_examples=100, deadline=None)
def test_whole_windows(length: int, window: int, stride: int) -> None:
    starts = [i for i in range(length) if i % stride == 0 and i + window < length][:-1]
    windows = [Window(0, i, i + 1, i + window) for i in starts]
    assert list(windows_of(0, length, window, stride, whole=True)) == windows


@given(begin=st.integers(0, 50), first=st.integers(1, 3000), scored=st.integers(1, 3000))
@settings(max_examples=100, deadline=None)
def test_sums_by_context(begin: int, first: int, scored: int) -> None:
    window = Window(0, begin, begin + first, begin + first + scored)
    losses = np.arange(scored) + 7.0
    expected: dict[int, list[float]] = defaultdict(list)
    for i in range(scored):
        expected[max(b for b, edge in enumerate(EDGES) if edge <= first + i)].append(losses[i])
    assert window.bins() == [(b, len(values)) for b, values in expected.items()]
    assert window.sums(losses) == [sum(values) for values in expected.values()]


def test_the_bins() -> None:
    assert EDGES[:24] == [*range(1, 17), *range(18, 33, 2)]
    assert all(1.06 < b / a < 1.13 for a, b in zip(EDGES[15:], EDGES[16:], strict=False)) and EDGES[-1] > 1 << 30


@pytest.mark.parametrize("stride", [1, 5, 15])
@pytest.mark.parametrize("chunk", [1, 100, 1 << 18])
def test_tokens_and_contexts(journal: Journal, stride: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that tells what it scored: the means are those of a loop over tokens."""
    monkeypatch.setattr(sliding_window, "CHUNK_TOKENS", chunk)
    documents = [document(length, 100 * length) for length in (0, 1, 2, 16, 17, 40)]
    engine = KnownEngine(loss_of)
    scores, details = evaluate(engine, documents, [16], stride, journal, False)
    losses = []
    by_context = defaultdict(list)
    for one in documents:
        for t in range(1, len(one.ids)):
            context = context_of(t, len(one.ids), 16, stride)
            losses.append(loss_of(int(one.ids[t]), context))
            by_context[context].append(losses[-1])
    assert engine.asked == len(losses) == scores["loss@16"].n
    assert scores["loss@16"].value == pytest.approx(sum(losses) / len(losses), rel=1e-14)
    window = details["windows"]["16"]
    assert {one["context"][0]: one["tokens"] for one in window["by_context"]} == {
        context: len(values) for context, values in sorted(by_context.items())
    }
    for one in window["by_context"]:
        values = by_context[one["context"][0]]
        assert one["context"][0] == one["context"][1]
        assert one["loss"] == pytest.approx(sum(values) / len(values), rel=1e-14)


@pytest.mark.parametrize("name", ["sambay", "transformer"])
def test_a_model(journal: Journal, name: str) -> None:
    """A float64 model token by token: the loss of each is computed alone, with its own context."""
    model = build(architecture(name))
    ids = torch.randint(64, (37,), generator=torch.Generator().manual_seed(3))
    losses = []
    for t in range(1, 37):
        context = context_of(t, 37, 16, 6)
        with torch.inference_mode():
            logits = model(ids[None, t - context : t]).logits[0, -1]
        losses.append(logits.logsumexp(0) - logits[ids[t]])
    expected = torch.stack(losses).mean().item()
    scores, _ = evaluate(PlainEngine(model), [Document(ids.numpy(), 120, 20)], [16], 6, journal, False)
    assert scores["loss@16"].value == pytest.approx(expected, rel=1e-10)
    assert scores["perplexity@16"].value == pytest.approx(math.exp(expected), rel=1e-10)
    assert scores["bits_per_byte@16"].value == pytest.approx(36 * expected / math.log(2) / 100, rel=1e-10)


def test_whole_windows_of_a_model(journal: Journal) -> None:
    """The mean over windows of each one's mean loss, as ArchScale has it."""
    model = build(architecture("transformer"))
    ids = torch.randint(64, (50,), generator=torch.Generator().manual_seed(3))
    means = []
    for begin in [i for i in range(0, 50 - 16, 8)][:-1]:
        x = ids[begin : begin + 16]
        with torch.inference_mode():
            means.append(torch.nn.functional.cross_entropy(model(x[None]).logits[0, :-1], x[1:]).item())
    scores, _ = evaluate(PlainEngine(model), [Document(ids.numpy(), 120)], [16], 8, journal, True)
    assert scores["loss@16"].value == pytest.approx(sum(means) / len(means), rel=1e-10)
    assert scores["loss@16"].n == 15 * len(means) and "bits_per_byte@16" not in scores


def test_the_standard_error(journal: Journal) -> None:
    """Over documents where there are many, over blocks of a window elsewhere: as wide as the means of samples are."""
    rng = np.random.default_rng(5)
    effects = rng.normal(size=400)
    documents = [Document(np.full(9, i), None) for i in range(400)]
    engine = KnownEngine(lambda token, context: 3 + effects[token])
    scores, details = evaluate(engine, documents, [16], 8, journal, False)
    assert scores["loss@16"].stderr == pytest.approx(effects.std(ddof=1) / 20, rel=1e-12)
    assert scores["perplexity@16"].stderr == pytest.approx(
        math.exp(scores["loss@16"].value) * scores["loss@16"].stderr, rel=1e-12
    )
    assert details["windows"]["16"]["stderr_over"] == "400 documents"

    # Documents of other lengths: the spread of the mean over samples of documents.
    lengths = rng.integers(2, 30, size=400)

    def mean_of(sample: np.ndarray) -> tuple[float, float]:
        losses = Losses(100)
        for unit, i in enumerate(sample):
            window = Window(0, 0, 1, int(lengths[i]))
            losses.add((unit, 0), window, window.sums(np.full(lengths[i] - 1, effects[i])))
        _, mean, error = losses.mean()
        assert error is not None
        return mean, error

    sampled = [mean_of(rng.integers(400, size=60))[0] for _ in range(300)]
    assert mean_of(np.arange(400))[1] * math.sqrt(400 / 60) == pytest.approx(np.std(sampled), rel=0.15)


def test_blocks_of_one_document(journal: Journal) -> None:
    losses = np.random.default_rng(6).normal(size=50)
    engine = KnownEngine(lambda token, context: losses[token], max_length=8)
    scores, details = evaluate(engine, [document(43)], [8], 4, journal, False)
    assert details["windows"]["8"]["stderr_over"] == "6 blocks of 8 tokens"
    mean = losses[1:43].mean()
    residuals = [(losses[max(8 * block, 1) : min(8 * block + 8, 43)] - mean).sum() for block in range(6)]
    assert scores["loss@8"].value == pytest.approx(mean, rel=1e-12)
    assert scores["loss@8"].stderr == pytest.approx(math.sqrt(np.square(residuals).sum() * 6 / 5) / 42, rel=1e-12)
    alone, _ = evaluate(engine, [document(7)], [8], 4, Journal(journal.path.with_name("b.json"), {}), False)
    assert alone["loss@8"].stderr is None


def test_what_a_journal_has_is_not_computed(journal: Journal) -> None:
    engine = KnownEngine(loss_of)
    documents = [document(40), document(30, 1000)]
    windows = [w for i, d in enumerate(documents) for w in windows_of(i, len(d.ids), 16, 5)]
    advanced: list[int] = []
    whole = list(measure(engine, documents, windows, journal, "16", advanced.append))
    assert sum(advanced) == engine.asked == 68
    for key in list(journal.done)[::2]:
        del journal.done[key]
    advanced, engine.asked = [], 0
    assert list(measure(engine, documents, windows, journal, "16", advanced.append)) == whole
    assert 0 < engine.asked < 68 == sum(advanced)
    assert not any(key in journal.done for w in windows for key in [f"8/{w.document}/{w.begin}-{w.first}-{w.end}"])


def test_data_parallel_ranks_divide_the_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ranks, as threads: each gets all results, and the work is done once."""
    documents = [document(40), document(31, 1000)]
    windows = [w for i, d in enumerate(documents) for w in windows_of(i, len(d.ids), 16, 5)]
    alone = list(measure(KnownEngine(loss_of), documents, windows, Journal(tmp_path / "0.json", {}), "16"))
    monkeypatch.setattr(sliding_window, "CHUNK_TOKENS", 50)
    gathered: list[Any] = [None] * 3
    barrier = threading.Barrier(3, timeout=60)
    engines = [KnownEngine(loss_of) for _ in range(3)]

    def run(rank: int) -> list[tuple[Window, list[float]]]:
        def of_all_ranks(found: Any) -> list[Any]:
            gathered[rank] = found
            barrier.wait()
            results = list(gathered)
            barrier.wait()
            return results

        own.of_all_ranks = of_all_ranks
        engines[rank].rank, engines[rank].world_size = rank, 3
        journal = Journal(tmp_path / f"{rank + 1}.json", {})
        return list(measure(engines[rank], documents, windows, journal, "16"))

    own = threading.local()
    monkeypatch.setattr(sliding_window, "agreement", own)
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(run, range(3))) == [alone] * 3
    assert sum(engine.asked for engine in engines) == 69 and all(engine.asked for engine in engines)


def test_nothing_to_score(journal: Journal) -> None:
    with pytest.raises(ValueError, match="nothing to score in windows of 16; the longest document has 1 tokens"):
        evaluate(KnownEngine(loss_of), [document(1), document(0)], [16], 5, journal, False)
