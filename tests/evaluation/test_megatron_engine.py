"""What the engine over Megatron's model says at every layout, beside a model that knows nothing of Megatron."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from archscale_megatron.evaluation.engine import draw, generator
from tests.evaluation.megatron_cases import CASES, CONTINUED, GREEDY, LAYOUTS, SAMPLED, prompts, requests, write
from tests.launch import torchrun


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """What the engine said, and the models in float64."""
    directory = tmp_path_factory.mktemp("runs")
    references = {case: write(directory, *case) for case in CASES}
    torchrun(4, "-m", "tests.evaluation.megatron_worker", str(directory))
    return torch.load(directory / "found.pt"), references


def layouts_of(case: tuple[str, bool]) -> list[tuple[int, int]]:
    return [layout for layout, cases in LAYOUTS.items() if case in cases]


@torch.no_grad()
def logprobs(model: Any, text: list[int]) -> Tensor:
    """float64 [s, vocabulary], of one text alone."""
    return model(torch.tensor([text])).logits[0].double().log_softmax(-1)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_scores_are_those_of_the_whole_model(answers: Any, case: tuple[str, bool]) -> None:
    found, references = answers
    for i, (sequence, first) in enumerate(zip(*requests(), strict=True)):
        expected = logprobs(references[case], sequence[:-1])[first - 1 :]
        labels = torch.tensor(sequence[first:])
        for layout in layouts_of(case):
            got, greedy = found[*case, layout]["score"][i]
            assert got.dtype == torch.float32 and greedy.dtype == torch.bool
            torch.testing.assert_close(got.double(), expected.gather(1, labels[:, None])[:, 0], rtol=0, atol=1e-5)
            assert torch.equal(greedy, expected.argmax(-1) == labels)


@pytest.mark.parametrize("case", CONTINUED, ids=str)
def test_texts_are_those_of_the_whole_model(answers: Any, case: tuple[str, bool]) -> None:
    found, references = answers
    for i, prompt in enumerate(prompts()):
        for name, sampling in (("greedy", GREEDY), ("sampled", SAMPLED)):
            text, random = list(prompt), [generator(sampling.seed, i)]
            while len(text) < len(prompt) + sampling.max_new_tokens and text[len(prompt) :][-1:] != [0]:
                logits = logprobs(references[case], text)[-1:]
                text.append(int(draw(logits, sampling, random) if name == "sampled" else logits.argmax()))
            for layout in layouts_of(case):
                assert found[*case, layout][name][i] == text[len(prompt) :]


def test_half_precision_is_near(answers: Any) -> None:
    found, _ = answers
    for (half, _), (single, _) in zip(found["half"]["score"], found["sambay", True, (2, 2)]["score"], strict=True):
        assert 1e-4 < (half - single).abs().max() < 0.2
