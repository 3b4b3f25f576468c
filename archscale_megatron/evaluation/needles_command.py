"""`evaluation needles`: which needles does a model find in how long a haystack?"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from archscale_megatron.evaluation import retrieval_command, retrieval_plot
from archscale_megatron.evaluation.contexts import Item
from archscale_megatron.evaluation.needles import NEW_TOKENS, TASKS, Haystack, hits, item
from archscale_megatron.evaluation.report import Report, aligned, described_file
from archscale_megatron.evaluation.retrieval import Question

WITHOUT_TEXT = [name for name, task in TASKS.items() if task.haystack != "essay"]


def add_commands(commands: Any) -> None:
    """Add `needles`."""
    parser = commands.add_parser("needles", help="RULER's needles in haystacks of any length")
    parser.add_argument("--tasks", metavar="NAME,...", help="(all; without --haystack those that need no text)")
    parser.add_argument(
        "--lengths", type=retrieval_command.numbers(1), default=[1024, 2048, 4096], metavar="N,...",
        help="tokens of a prompt and its answer (1024,2048,4096)",
    )  # fmt: skip
    parser.add_argument("--haystack", type=Path, metavar="FILE", help="UTF-8 text to hide needles in, such as essays")
    retrieval_command.add_options(parser, samples=100, seeds="0", new_tokens=NEW_TOKENS)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Raises ValueError for options that do not fit each other or the model."""
    tasks = _tasks(args)
    haystack = _haystack(args.haystack) if args.haystack else None
    options = {
        "tasks": tasks,
        "lengths": args.lengths,
        "haystack": described_file(args.haystack) if args.haystack else None,
    }

    def make(tokenizer: Any, question: Question) -> Item:
        task = question.group.partition("@")[0]
        return item(
            task, question.size, question.seed, question.index,
            tokenizer=tokenizer, haystack=haystack, new_tokens=args.max_new_tokens,
        )  # fmt: skip

    asked = [
        Question(f"{task}@{length}", length, seed, index, length)
        for length in args.lengths
        for task in tasks
        for seed in args.seeds
        for index in range(args.samples)
    ]
    made = retrieval_command.run(args, "needles", options, lambda _: asked, make, hits, "string_match_all")
    retrieval_command.show(args, made, table(made), retrieval_plot.heat_maps)


def _tasks(args: argparse.Namespace) -> list[str]:
    if args.tasks is None:
        return list(TASKS) if args.haystack else WITHOUT_TEXT
    tasks = list(dict.fromkeys(args.tasks.split(",")))
    for task in tasks:
        if task not in TASKS:
            raise ValueError(f"--tasks {task}: there is no such task; use any of {', '.join(TASKS)}")
        if TASKS[task].haystack == "essay" and not args.haystack:
            raise ValueError(
                f"--tasks {task}: hides its needles in a text; give one with --haystack FILE, or only tasks that need "
                f"none: {','.join(WITHOUT_TEXT)}"
            )
    return tasks


def _haystack(path: Path) -> Haystack:
    try:
        return Haystack(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--haystack {path}: cannot be used ({error})") from None


def table(report: Report) -> str:
    """Percent of the answers that were given, a row a task, a column a length; the last row is RULER's mean."""
    cells = {tuple(name.split("@")): score for name, score in report.scores.items()}
    tasks, lengths = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
    rows = [["needles found, %", *(f"{int(length):,}" for length in lengths)]]
    for task in tasks:
        scores = [cells[task, length] for length in lengths]
        rows.append(
            [task, *(f"{100 * s.value:.1f}" + (f" ± {100 * s.stderr:.1f}" if s.stderr else "") for s in scores)]
        )
    means = (statistics.mean(cells[task, length].value for task in tasks) for length in lengths)
    return "\n".join(aligned([*rows, ["mean", *(f"{100 * mean:.1f}" for mean in means)]]))
