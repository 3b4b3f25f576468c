r"""Questions of the reasoning benchmarks, from local files, one line of JSON a question, as their data sets have them.

| task | fields | answer |
| --- | --- | --- |
| aime24, aime25 | problem, answer (HuggingFaceH4/aime_2024, yentinglin/aime_2025) | integer from 0 to 999 |
| math_500 | problem, answer, level, subject (HuggingFaceH4/MATH-500) | LaTeX |
| gpqa, gpqa_diamond | Question, Correct Answer, Incorrect Answer 1 to 3 (Idavidrein/gpqa) | letter |
| gsm8k | question, answer that ends in `#### 42` (openai/gsm8k) | number |
| math | problem, answer: any of your own | LaTeX |

Further fields do not matter. A model is asked for a boxed answer, in the sentence that DeepSeek-R1's authors ask with
(arXiv 2501.12948) and most reports of reasoning scores since; an own template replaces it.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LETTERS = "ABCD"
PLACE = "{problem}"
MATH = rf"Please reason step by step, and put your final answer within \boxed{{}}. {PLACE}"
CHOICE = (
    "Please reason step by step, and put the letter of the right choice, one of A, B, C and D, "
    rf"within \boxed{{}}. {PLACE}"
)


@dataclass(frozen=True)
class Question:
    """
    Attributes:
        problem: What is asked, with the choices where there are some.
        answer: The right one: LaTeX without dollars, or a letter.
        groups: What the data say about it, such as {"level": "5"}.
    """

    problem: str
    answer: str
    groups: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """
    Attributes:
        kind: How answers are compared: "math" or "letter".
        prompt: With {problem} where the problem belongs.
        question: Makes a question of the fields of a line; raises ValueError for what is wrong with them.
    """

    kind: str
    prompt: str
    question: Callable[[Mapping[str, Any]], Question]


def read_questions(path: Path, task: str) -> list[Question]:
    """The questions of a task, in the order of the file.

    Raises:
        ValueError: the file cannot be read, has no question, or a line is not as the task's data set has it; the
            message is one line with the number of that line.
    """
    try:
        lines = path.read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--data {path}: cannot be read ({error})") from None
    questions = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            if not isinstance(fields, dict):
                raise ValueError("not an object")
            questions.append(TASKS[task].question(fields))
        except ValueError as error:
            what = f"not JSON ({error})" if isinstance(error, json.JSONDecodeError) else error
            raise ValueError(f"{path}:{number}: {what}") from None
    if not questions:
        raise ValueError(f"--data {path}: has no questions")
    return questions


def read_template(path: Path | None, task: str) -> str:
    """The prompt of a task, or the one in a file; raises ValueError if that has no place for the problem."""
    if path is None:
        return TASKS[task].prompt
    try:
        template = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompt-template {path}: cannot be read ({error})") from None
    if PLACE not in template:
        raise ValueError(f"--prompt-template {path}: has no {PLACE}, the place where the problem belongs")
    return template


def prompt_ids(tokenizer: Any, text: str, system: str | None, chat: str) -> list[int]:
    """Token ids of a prompt.

    Args:
        system: A system message; without a chat template it stands before the text.
        chat: Whether the tokenizer's chat template is used: "on", "off", or "auto" where there is one.
    """
    if chat == "on" and not tokenizer.chat_template:
        raise ValueError("--chat-template on: this model's tokenizer has no chat template; give off or auto")
    if chat != "off" and tokenizer.chat_template:
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": text})
        whole = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return tokenizer(whole, add_special_tokens=False).input_ids  # the template has them
    return tokenizer(f"{system}\n\n{text}" if system else text).input_ids


def _text(fields: Mapping[str, Any], name: str, kinds: type | tuple[type, ...] = str) -> str:
    if name not in fields:
        raise ValueError(f'no field "{name}"; there are {", ".join(fields) or "none"}')
    value = fields[name]
    if not isinstance(value, kinds) or isinstance(value, bool) or not str(value).strip():
        raise ValueError(f'field "{name}" is {json.dumps(value)[:60]}; it must be a text that is not empty')
    return str(value).strip()


def _groups(fields: Mapping[str, Any], names: Sequence[str]) -> dict[str, str]:
    return {name.lower(): str(fields[name]) for name in names if fields.get(name) is not None}


def _math(fields: Mapping[str, Any]) -> Question:
    answer = _text(fields, "answer", (str, int, float))
    return Question(_text(fields, "problem"), answer, _groups(fields, ("level", "subject")))


def _aime(fields: Mapping[str, Any]) -> Question:
    answer = _text(fields, "answer", (str, int))
    if not re.fullmatch(r"[0-9]{1,3}", answer):
        raise ValueError(f'field "answer" is {answer[:60]!r}; answers of AIME are integers from 0 to 999')
    return Question(_text(fields, "problem"), str(int(answer)))


def _gsm8k(fields: Mapping[str, Any]) -> Question:
    question, answer = _text(fields, "question"), _text(fields, "answer")
    _, mark, number = answer.rpartition("####")
    number = re.sub(r"[,$\s]", "", number)
    if not mark or not re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", number):
        raise ValueError('field "answer" does not end in "#### " and a number')
    return Question(question, number)


def _gpqa(fields: Mapping[str, Any]) -> Question:
    problem, right = _text(fields, "Question"), _text(fields, "Correct Answer", (str, int, float))
    choices = [right, *(_text(fields, f"Incorrect Answer {i}", (str, int, float)) for i in (1, 2, 3))]
    order = list(range(len(choices)))
    # Of the question alone, so that every run asks the same, of a part of the file too.
    random.Random(problem).shuffle(order)
    listed = "\n".join(f"{letter}) {choices[i]}" for letter, i in zip(LETTERS, order, strict=True))
    groups = {"domain": "High-level domain", "subdomain": "Subdomain"}
    known = {name: str(fields[field]) for name, field in groups.items() if fields.get(field)}
    return Question(f"{problem}\n\n{listed}", LETTERS[order.index(0)], known)


TASKS = {
    "aime24": Task("math", MATH, _aime),
    "aime25": Task("math", MATH, _aime),
    "math_500": Task("math", MATH, _math),
    "gpqa": Task("letter", CHOICE, _gpqa),
    "gpqa_diamond": Task("letter", CHOICE, _gpqa),
    "gsm8k": Task("math", MATH, _gsm8k),
    "math": Task("math", MATH, _math),
}
