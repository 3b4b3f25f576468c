"""What sampled answers to questions say about a model: each graded, the scores of all, and the responses to be kept."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from archscale_megatron.checkpoint import files
from archscale_megatron.evaluation import report
from archscale_megatron.evaluation.grading import Grade, Grader
from archscale_megatron.evaluation.pass_at_k import Mean, majority, mean, pass_at_k
from archscale_megatron.evaluation.reason_data import TASKS, Question
from archscale_megatron.evaluation.report import Score

RESPONSES = ".responses.jsonl"
INTERVAL = "95 %, Wilson's, of as many trials as would have this standard error, which is clustered by question"
Samples = list[list[dict[str, Any]]]
"""Of each question, of each sample, its "text", number of "tokens", and whether it "ended" by itself."""


def grade(
    task: str,
    questions: Sequence[Question],
    samples: Samples,
    path: Path,
    source: dict[str, Any],
    options: dict[str, Any],
) -> tuple[dict[str, Score], dict[str, Any]]:
    """Scores and details of a report; the responses are written beside it, each with its grade."""
    from tqdm import tqdm

    kind, grades, majorities = TASKS[task].kind, [], []
    with Grader() as grader:
        for question, own in zip(tqdm(questions, unit="question", desc="grading", disable=None), samples, strict=True):
            graded = [grader.grade(sample["text"], question.answer, kind) for sample in own]
            grades.append(graded)
            majorities.append(majority_is_right(graded, grader))
        unreadable = [
            q for q, one in enumerate(questions)
            if not grader.grade(f"\\boxed{{{one.answer}}}", one.answer, kind).correct
        ]  # fmt: skip
    _write_responses(path, questions, samples, grades, source, options)
    means = score_means(grades, majorities)
    names = {name: task if name == "pass@1" else f"{task}/{name}" for name in means}
    every = [sample for own in samples for sample in own]
    tokens = [sum(sample["tokens"] for sample in own) / len(own) for own in samples]
    cut = sum(not sample["ended"] for sample in every) / len(every)
    scores = {names[name]: Score(one.value, one.stderr, len(questions), name) for name, one in means.items()}
    scores[f"{task}/tokens"] = Score(sum(tokens) / len(tokens), None, len(every), "tokens", higher_is_better=False)
    scores[f"{task}/cut_off"] = Score(cut, None, len(every), "share", higher_is_better=False)
    flat = [one for own in grades for one in own]
    details = {
        "interval": INTERVAL,
        "intervals": {names[name]: [one.low, one.high] for name, one in means.items()},
        "groups": _groups(questions, grades),
        "without_answer": sum(one.answer is None for one in flat) / len(flat),
        "grading_failed": sum(one.failed for one in flat),
        "unreadable": unreadable,
        "questions": [
            {"answer": question.answer, "correct": sum(one.correct for one in own), "answers": [g.answer for g in own]}
            for question, own in zip(questions, grades, strict=True)
        ],
    }
    return scores, details


def majority_is_right(grades: Sequence[Grade], grader: Grader) -> float:
    """Whether the answer that most samples agree on is right: 0 or 1, and where groups tie the share of them that is
    right, which is what a draw among them has on average. Samples without an answer have no vote; without any vote
    it is 0."""
    votes = [one for one in grades if one.answer is not None and not one.failed]
    # Right answers are equal to one another, by way of the one in the data.
    largest = majority(votes, lambda a, b: a.correct and b.correct or a.correct == b.correct and grader.equal(a, b))
    return sum(votes[group[0]].correct for group in largest) / len(largest) if largest else 0.0


def score_means(grades: Sequence[Sequence[Grade]], majorities: Sequence[float]) -> dict[str, Mean]:
    """pass@1, pass@k for the powers of two up to the samples of a question and for all of them, and maj@n."""
    n = len(grades[0])
    right = [sum(one.correct for one in own) for own in grades]
    ks = sorted({n} | {2**e for e in range(n.bit_length())})
    found = {f"pass@{k}": mean([pass_at_k(n, c, k) for c in right], n // k) for k in ks}
    return found | ({f"maj@{n}": mean(majorities)} if n > 1 else {})


def _groups(questions: Sequence[Question], grades: Sequence[Sequence[Grade]]) -> dict[str, Any]:
    """pass@1 by what the data say about their questions."""
    values: dict[str, dict[str, list[float]]] = {}
    for question, own in zip(questions, grades, strict=True):
        for name, group in question.groups.items():
            share = sum(one.correct for one in own) / len(own)
            values.setdefault(name, {}).setdefault(group, []).append(share)
    return {
        name: {
            group: {"pass@1": (one := mean(shares, len(grades[0]))).value, "stderr": one.stderr, "n": len(shares)}
            for group, shares in sorted(groups.items())
        }
        for name, groups in sorted(values.items())
    }


def lines_of(details: dict[str, Any]) -> list[str]:
    """What the table of scores does not say."""
    lines = [f"{name}: 95 % interval {low:.4f} to {high:.4f}" for name, (low, high) in details["intervals"].items()]
    lines.append(f"without an answer: {details['without_answer']:.1%}")
    if details["grading_failed"]:
        lines.append(f"counted as wrong because grading them took too long: {details['grading_failed']}")
    if details["unreadable"]:
        numbers = ", ".join(str(q + 1) for q in details["unreadable"])
        lines.append(f"answers of the data that math-verify does not find equal to themselves: questions {numbers}")
    rows = [
        (name, group, f"{one['pass@1']:.4f}", "" if one["stderr"] is None else f"± {one['stderr']:.4f}", str(one["n"]))
        for name, groups in details["groups"].items()
        for group, one in groups.items()
    ]
    return [*lines, *report.aligned([("by", "", "pass@1", "± stderr", "n"), *rows], left=2)] if rows else lines


def _write_responses(
    path: Path,
    questions: Sequence[Question],
    samples: Samples,
    grades: Sequence[Sequence[Grade]],
    source: dict[str, Any],
    options: dict[str, Any],
) -> None:
    lines: list[Any] = [{"checkpoint": source, "options": options}]
    for q, (question, own, graded) in enumerate(zip(questions, samples, grades, strict=True)):
        for i, (sample, one) in enumerate(zip(own, graded, strict=True)):
            found = {"answer": one.answer, "right_answer": question.answer, "correct": one.correct}
            lines.append(
                {"question": q, "sample": i} | {key: sample[key] for key in ("text", "tokens", "ended")} | found
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(report.plain(line), ensure_ascii=False) + "\n" for line in lines)
    files.replace(path.with_suffix(RESPONSES), text)


def read_responses(path: Path, questions: int) -> tuple[Samples, dict[str, Any]]:
    """The samples beside a report, and the checkpoint that they are of.

    Raises:
        ValueError: there are none, or they are damaged.
    """
    path = path.with_suffix(RESPONSES)
    if not path.is_file():
        raise ValueError(f"--regrade: there is no {path}; it is of a finished run with the same options")
    try:
        header, *lines = map(json.loads, path.read_text("utf-8").removesuffix("\n").split("\n"))
        samples: Samples = [[] for _ in range(questions)]
        for line in lines:
            samples[line["question"]].append({key: line[key] for key in ("text", "tokens", "ended")})
        if len({len(own) for own in samples}) != 1:
            raise ValueError("samples are missing")
        return samples, header["checkpoint"]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"--regrade: {path} is damaged ({type(error).__name__}: {error})") from None
