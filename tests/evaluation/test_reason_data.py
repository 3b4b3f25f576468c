"""Questions from files in the form of their data sets, and the prompts made of them."""

import json
from pathlib import Path
from typing import Any

import pytest

from archscale_megatron.evaluation.reason_data import TASKS, prompt_ids, read_questions, read_template

GPQA = {
    "Record ID": "rec1", "High-level domain": "Physics", "Subdomain": "Optics", "Question": "What is it?",
    "Correct Answer": "light", "Incorrect Answer 1": "sound", "Incorrect Answer 2": "heat",
    "Incorrect Answer 3": "rain",
    "Explanation": "It is.",
}  # fmt: skip
LINES: dict[str, dict[str, Any]] = {
    "aime24": {"id": 60, "problem": "Find $x$.", "solution": "...", "answer": "025", "url": "", "year": "2024"},
    "aime25": {"problem": "Find $x$.", "answer": 25},
    "math_500": {
        "problem": "Find $x$.", "solution": "...", "answer": r"\frac{1}{2}", "subject": "Algebra", "level": 5,
        "unique_id": "test/algebra/1.json",
    },
    "gpqa": GPQA,
    "gpqa_diamond": GPQA,
    "gsm8k": {"question": "How many?", "answer": "She has 2 * 600 = <<2*600=1200>>1200.\n#### 1,200"},
    "math": {"problem": "Find $x$.", "answer": 0.5},
}  # fmt: skip


def written(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_each_task(tmp_path: Path) -> None:
    found = {task: read_questions(written(tmp_path / task, line, "", line), task) for task, line in LINES.items()}
    assert found.keys() == TASKS.keys() and all(len(questions) == 2 for questions in found.values())
    answers = {task: questions[0].answer for task, questions in found.items()}
    assert {task: answer for task, answer in answers.items() if "gpqa" not in task} == {
        "aime24": "25", "aime25": "25", "math_500": r"\frac{1}{2}", "gsm8k": "1200", "math": "0.5",
    }  # fmt: skip
    assert found["math_500"][0].groups == {"level": "5", "subject": "Algebra"}
    assert found["gpqa"][0].groups == {"domain": "Physics", "subdomain": "Optics"}
    assert found["gsm8k"][0].problem == "How many?" and found["aime24"][0].groups == {}


def test_choices_are_shuffled_by_their_question(tmp_path: Path) -> None:
    lines = [GPQA | {"Question": f"What is {i}?"} for i in range(400)]
    questions = read_questions(written(tmp_path / "gpqa", *lines), "gpqa")
    for question in questions:
        _, _, *choices = question.problem.split("\n")
        texts = {choice[0]: choice[3:] for choice in choices}
        assert [choice[:3] for choice in choices] == ["A) ", "B) ", "C) ", "D) "]
        assert texts[question.answer] == "light" and set(texts.values()) == {"light", "sound", "heat", "rain"}
    counts = [sum(question.answer == letter for question in questions) for letter in "ABCD"]
    assert min(counts) > 70
    # A part of the file, in another order, asks the same.
    assert read_questions(written(tmp_path / "part", *lines[7:3:-1]), "gpqa") == questions[7:3:-1]


@pytest.mark.parametrize(
    ("task", "line", "message"),
    [
        ("aime24", {"question": "?", "answer": "1"}, 'no field "problem"; there are question, answer'),
        ("aime24", {"problem": "?", "answer": "1000"}, "'1000'; answers of AIME are integers from 0 to 999"),
        ("aime25", {"problem": "?", "answer": "x"}, "answers of AIME are integers"),
        ("aime24", {"problem": "?", "answer": True}, 'field "answer" is true; it must be a text'),
        ("math_500", {"problem": " ", "answer": "1"}, 'field "problem" is " "; it must be a text that is not empty'),
        ("math", {"problem": 3, "answer": "1"}, 'field "problem" is 3; it must be a text'),
        ("gsm8k", {"question": "?", "answer": "12"}, 'does not end in "#### " and a number'),
        ("gsm8k", {"question": "?", "answer": "#### twelve"}, 'does not end in "#### " and a number'),
        ("gpqa", GPQA | {"Incorrect Answer 2": None}, 'field "Incorrect Answer 2" is null'),
        ("gpqa", {key: value for key, value in GPQA.items() if "3" not in key}, 'no field "Incorrect Answer 3"'),
        ("math", [1], "not an object"),
        ("math", "{", "not JSON (Expecting"),
    ],
)  # fmt: skip
def test_errors_name_the_line(tmp_path: Path, task: str, line: Any, message: str) -> None:
    path = written(tmp_path / "data.jsonl", LINES[task], "", line)
    with pytest.raises(ValueError) as caught:
        read_questions(path, task)
    assert str(caught.value).startswith(f"{path}:3: ") and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_errors_of_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--data .*none: cannot be read"):
        read_questions(tmp_path / "none", "math")
    with pytest.raises(ValueError, match="has no questions"):
        read_questions(written(tmp_path / "empty", "", ""), "math")
    with pytest.raises(ValueError, match=r"--prompt-template .*: has no \{problem\}"):
        read_template(written(tmp_path / "template", "Solve it."), "math")
    with pytest.raises(ValueError, match="--prompt-template .*: cannot be read"):
        read_template(tmp_path / "none", "math")
    assert read_template(written(tmp_path / "own", r"Q: {problem} \boxed{}"), "math") == "Q: {problem} \\boxed{}\n"
    assert read_template(None, "gpqa") == TASKS["gpqa"].prompt


class Tokenizer:
    """Characters as ids, behind a 1 where special tokens are added."""

    def __init__(self, chat_template: str | None = None) -> None:
        self.chat_template = chat_template

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        ids = [1] * add_special_tokens + [ord(one) for one in text]
        return type("Encoding", (), {"input_ids": ids})

    def apply_chat_template(self, messages: list[dict[str, str]], add_generation_prompt: bool, tokenize: bool) -> str:
        assert add_generation_prompt and not tokenize
        return "\x01" + "".join(f"<{one['role']}>{one['content']}" for one in messages) + "<assistant>"


@pytest.mark.parametrize(
    ("template", "chat", "system", "expected"),
    [
        (None, "auto", None, "\x01Q"),
        (None, "off", "S", "\x01S\n\nQ"),
        ("there", "auto", None, "\x01<user>Q<assistant>"),
        ("there", "on", "S", "\x01<system>S<user>Q<assistant>"),
        ("there", "off", None, "\x01Q"),
    ],
)
def test_prompts(template: str | None, chat: str, system: str | None, expected: str) -> None:
    assert prompt_ids(Tokenizer(template), "Q", system, chat) == [ord(one) for one in expected]


def test_a_chat_template_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="--chat-template on: .* no chat template"):
        prompt_ids(Tokenizer(), "Q", None, "on")
