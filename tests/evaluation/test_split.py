"""Every command at tensor, pipeline and data parallelism: scores and items of one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from archscale_megatron.evaluation.__main__ import main
from archscale_megatron.evaluation.reason_report import RESPONSES
from tests.evaluation.runs import write_run, write_tokenizer
from tests.evaluation.test_lm_eval import SOURCE, write_tasks
from tests.launch import torchrun

LAYOUTS = ["2,2", "2,1", "1,1"]
"""Tensor, pipeline parallelism on four processes; the others are data parallel."""
QUESTIONS = [{"problem": f"How many are {i} and {i}?", "answer": str(2 * i)} for i in range(5)]


def commands(root: Path) -> list[list[str]]:
    write_tasks(root / "tasks")
    (root / "text.txt").write_text("\n\n".join(SOURCE[:12]))
    (root / "questions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS))
    run = write_run(root / "run", "sambay", write_tokenizer(root / "tokenizer"))
    tasks = "local_choice,local_last,local_rolling,local_until"
    each = {
        "lm-eval": ["--tasks", tasks, "--include-path", str(root / "tasks"), "--limit", "6", "--log-samples"],
        "perplexity": ["--data", str(root / "text.txt"), "--windows", "24,64", "--stride", "9", "--max-tokens", "700"],
        "needles": [
            "--tasks", "niah_single_1", "--lengths", "250", "--max-length", "250", "--samples", "5",
            "--max-new-tokens", "6",
        ],
        "phonebook": ["--entries", "4", "--max-length", "400", "--samples", "3", "--max-new-tokens", "6"],
        "reason": [
            "--task", "math_500", "--data", str(root / "questions.jsonl"), "--samples", "1", "--temperature", "0",
            "--max-new-tokens", "8",
        ],
    }  # fmt: skip
    return [[name, "--load", str(run), "--output", str(root / "LAYOUT"), *options] for name, options in each.items()]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The reports of "one" process and of each layout, by their kind."""
    root = tmp_path_factory.mktemp("split")
    given = commands(root)
    for command in given:
        assert main([argument.replace("LAYOUT", "one") for argument in command]) == 0
    joined = [argument for command in given for argument in ["--", *command]]
    torchrun(4, "-m", "tests.evaluation.split_worker", *LAYOUTS, *joined)
    found: dict[str, dict[str, Any]] = {}
    for layout in ["one", *LAYOUTS]:
        read = [json.loads(path.read_text()) for path in (root / layout).glob("*.json")]
        found[layout] = {report["kind"]: report for report in read}
        assert len(found[layout]) == len(read) == len(given)
        assert all(path.name.endswith(RESPONSES) for path in (root / layout).glob("*.jsonl"))  # no journal stays
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["lm-eval", "perplexity", "needles", "phonebook", "reason"])
def test_scores_are_those_of_one_process(reports: dict[str, Any], kind: str, layout: str) -> None:
    one, split = reports["one"][kind], reports[layout][kind]
    assert split["checkpoint"] == one["checkpoint"] and split["options"] == one["options"]
    assert split["scores"].keys() == one["scores"].keys()
    assert_close(split["scores"], one["scores"])
    assert_close(split["details"], one["details"])


def assert_close(found: Any, expected: Any) -> None:
    """Equal, numbers to what fp32 in another order gives."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected:
            assert_close(found[name], expected[name])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=2e-5, abs=2e-4)
    else:
        assert found == expected


def test_there_is_something_to_compare(reports: dict[str, Any]) -> None:
    one = reports["one"]
    texts = [shown["text"] for kind in ("needles", "phonebook") for group in one[kind]["details"].values()
             for shown in group["shown"]]  # fmt: skip
    assert len(set(texts)) > 1 and all(texts)
    assert len(one["lm-eval"]["details"]["samples"]["local_choice"]) == 6
    assert one["perplexity"]["scores"]["loss@24"]["n"] == 699
