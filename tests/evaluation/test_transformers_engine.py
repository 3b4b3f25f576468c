"""The engine beside plain forward passes of one sequence at a time, in float64."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from archscale_megatron.evaluation.engine import Sampling, by_length, draw, generator, scoring_batches, shared_prefixes
from archscale_megatron.evaluation.transformers_engine import TransformersEngine
from archscale_megatron.hf.loading import load
from tests.evaluation.runs import CONTEXT, write_run, write_tokenizer

FAMILIES = {"transformer": {}, "sambay": {}, "gdny": {}, "transformer_gqa4_h2_moe": {"sparsity": 3, "top_k": 2}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    tokenizer = write_tokenizer(root / "tokenizer")
    return {name: write_run(root / name, name, tokenizer, **options) for name, options in FAMILIES.items()}


def sequences() -> tuple[list[list[int]], list[int]]:
    """Choices behind long and short contexts, the same twice, one that begins another, and texts of their own."""
    draw_ids = torch.Generator().manual_seed(3)

    def ids(count: int) -> list[int]:
        return torch.randint(2, 2000, (count,), generator=draw_ids).tolist()

    found: list[tuple[list[int], int]] = []
    for length in (40, 39, 37, 20, 9, 3):
        context = ids(length)
        found += [(context + ids(choice), length) for choice in (1, 1, 7, 3)]
    whole = ids(60)
    found += [(whole, 1), (whole, 30), (whole[:31], 30), (whole[:30] + ids(1), 30), (ids(CONTEXT + 1), 50), (ids(2), 1)]
    return [tokens for tokens, _ in found], [first for _, first in found]


def expected(model: Any, tokens: Sequence[int], first: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities float64 [n], and whether each was the likeliest."""
    with torch.no_grad():
        logprobs = model(torch.tensor([tokens]), use_cache=False).logits[0].log_softmax(-1)
    targets = torch.tensor(tokens[first:])
    rows = logprobs[first - 1 : -1]
    return rows.gather(-1, targets[:, None]).squeeze(-1), rows.argmax(-1) == targets


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_single_sequences(runs: dict[str, Path], family: str) -> None:
    given, first = sequences()
    model = load(runs[family]).model.double()
    references = [expected(model, tokens, one) for tokens, one in zip(given, first, strict=True)]
    greedy = [[*tokens[:-1], int(model(torch.tensor([tokens[:-1]])).logits[0, -1].argmax())] for tokens in given[:3]]
    given, first = given + greedy, first + [len(tokens) - 1 for tokens in greedy]
    references += [expected(model, tokens, len(tokens) - 1) for tokens in greedy]
    for batch_size in (1, 3, 40):
        engine = TransformersEngine(runs[family], batch_size=batch_size)
        scores = dict(engine.score(given, first))
        assert scores.keys() == set(range(len(given)))
        for index, (logprobs, likeliest) in enumerate(references):
            torch.testing.assert_close(scores[index].logprobs.double(), logprobs, atol=3e-5, rtol=0)
            assert torch.equal(scores[index].greedy, likeliest), index
    assert all(bool(scores[index].greedy.all()) for index in range(len(given) - 3, len(given)))


def test_a_shared_prefix_is_read_once(runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = TransformersEngine(runs["sambay"], batch_size=1)
    context, other = list(range(100, 150)), list(range(200, 230))
    given = [[*context, i] for i in range(2, 6)] + [[*other, 2, 3, 4], [*other, 5, 6]]
    read: list[int] = []
    forward = engine.model.model.forward

    def counted(ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        read.append(ids.numel())
        return forward(ids, *args, **kwargs)

    monkeypatch.setattr(engine.model.model, "forward", counted)
    list(engine.score(given, [50] * 4 + [30] * 2))
    assert sum(read) == 49 + 4 + 29 + 2 * 3
    read.clear()
    list(engine.score(given, [1] * 6))
    assert sum(read) >= 4 * 50 + 2 * 32


def test_batches() -> None:
    assert list(by_length([3, 9, 1, 5, 5, 2], 10)) == [[1], [3, 4], [0], [5], [2]]  # no padding
    assert list(by_length([20, 19, 15, 99, 16, 20, 17, 8], 100)) == [[3], [0, 5, 1, 6], [4, 2], [7]]
    given, first = sequences()
    for budget in (1, 100, 10_000):
        batches = list(scoring_batches(given, first, budget))
        assert sorted(index for batch in batches for index, _ in batch.rows) == list(range(len(given)))
        for batch in batches:
            assert len({len(prefix) for prefix in batch.prefixes}) == 1
            for index, row in batch.rows:
                prefix = batch.prefixes[row]
                assert given[index][: len(prefix)] == list(prefix) and len(prefix) < first[index]
    few_shot = [[*range(100), 200 + item, 300 + choice] for item in range(50) for choice in range(2)]
    (group,) = shared_prefixes(few_shot, [101] * 100)
    assert group[0] == 100 and len(group[1]) == 100


@pytest.mark.parametrize("family", ["transformer", "sambay", "gdny"])
def test_greedy_texts_are_those_of_generate(runs: dict[str, Path], family: str) -> None:
    engine = TransformersEngine(runs[family], batch_size=2)
    text = "import os\nimport sys\n\ndef read_file(path):\n    return path.read_text()\n"
    prompts = [engine.tokenizer.encode(text[:length]) for length in (70, 3, 17, 30, 1, 8, 70, 45)]
    texts = dict(engine.generate(prompts, Sampling(max_new_tokens=12)))
    for index, prompt in enumerate(prompts):
        with torch.no_grad():
            whole = engine.model.generate(
                torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=list(engine.end)
            )
        assert texts[index].ids == whole[0, len(prompt) :].tolist()
        decoded = engine.tokenizer.decode(texts[index].ids, skip_special_tokens=True)
        assert decoded.startswith(texts[index].text) and not decoded[len(texts[index].text) :].strip("\ufffd")
        assert texts[index].ended == (texts[index].ids[-1] in engine.end)


def test_texts_end_before_a_stop_string_and_behind_an_end(runs: dict[str, Path]) -> None:
    engine = TransformersEngine(runs["sambay"])
    prompts = [engine.tokenizer.encode(text) for text in ("import os", "def f", "x = 1\n", "class A:")]
    plain = dict(engine.generate(prompts, Sampling(max_new_tokens=16)))
    stop = plain[1].text[7:10]
    stopped = dict(engine.generate(prompts, Sampling(max_new_tokens=16, stop=(stop, "\0never"))))
    for index, one in stopped.items():
        cut = plain[index].text.find(stop)
        assert one.text == (plain[index].text if cut < 0 else plain[index].text[:cut])
        assert one.ended == (cut >= 0) and plain[index].ids[: len(one.ids)] == one.ids
    assert stopped[1].ended and len(stopped[1].ids) < 16
    engine.end = (plain[2].ids[4],)
    ended = dict(engine.generate(prompts, Sampling(max_new_tokens=16)))[2]
    assert ended.ended and ended.ids == plain[2].ids[: plain[2].ids.index(engine.end[0]) + 1]
    assert ended.text == engine.tokenizer.decode(ended.ids[:-1])
    with pytest.raises(ValueError, match="a prompt has no tokens"):
        list(engine.generate([[]], Sampling(max_new_tokens=1)))


def test_samples_depend_on_seed_and_index_alone(runs: dict[str, Path]) -> None:
    prompts = [list(range(50, 60 + i % 3)) for i in range(9)]
    sampling = Sampling(max_new_tokens=8, temperature=1.0, seed=1)
    one, nine = (dict(TransformersEngine(runs["sambay"], batch_size=n).generate(prompts, sampling)) for n in (1, 9))
    assert one == nine
    assert len({tuple(text.ids) for text in one.values()}) == 9
    assert len({float(torch.rand((), generator=generator(seed, i))) for seed in (0, 1) for i in range(20)}) == 40
    part = dict(TransformersEngine(runs["sambay"]).generate(prompts[5:2:-1], sampling, [5, 4, 3]))
    assert [part[i] for i in range(3)] == [one[i] for i in (5, 4, 3)]
    other = dict(TransformersEngine(runs["sambay"]).generate(prompts, Sampling(8, temperature=1.0, seed=2)))
    assert all(other[i] != one[i] for i in range(9))
    narrow = dict(TransformersEngine(runs["sambay"]).generate(prompts, Sampling(8, temperature=0.7, top_k=1)))
    assert narrow == dict(TransformersEngine(runs["sambay"]).generate(prompts, Sampling(8)))


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.6}, {"top_k": 4, "top_p": 0.7, "temperature": 0.5}])
def test_draws_have_the_probabilities_of_transformers(options: dict[str, Any]) -> None:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.tensor([[0.3, 2.0, -1.0, 1.5, 0.9, -2.0]])
    sampling = Sampling(1, **{"temperature": 1.0} | options)
    warped = TemperatureLogitsWarper(sampling.temperature)(None, logits)
    if sampling.top_k:
        warped = TopKLogitsWarper(sampling.top_k)(None, warped)
    if sampling.top_p < 1:
        warped = TopPLogitsWarper(sampling.top_p)(None, warped)
    count = 20_000
    generators = [generator(3, i) for i in range(count)]
    found = draw(logits.expand(count, -1), sampling, generators).bincount(minlength=6) / count
    torch.testing.assert_close(found, warped.softmax(-1)[0], atol=0.012, rtol=0)
    assert not (found[warped[0].isinf()] > 0).any()
