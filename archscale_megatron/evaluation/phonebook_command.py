"""`evaluation phonebook`: in how long a phone book does a model find a number?"""

from __future__ import annotations

import argparse
import math
from typing import Any

from archscale_megatron.evaluation import retrieval_command, retrieval_plot
from archscale_megatron.evaluation.contexts import Item
from archscale_megatron.evaluation.phonebook import NEW_TOKENS, hits, item
from archscale_megatron.evaluation.report import Report, aligned
from archscale_megatron.evaluation.retrieval import Question

ENTRIES = 480
MARGIN = 1.05  # by which books of as many entries differ in tokens


def add_commands(commands: Any) -> None:
    """Add `phonebook`."""
    parser = commands.add_parser("phonebook", help="one number out of a phone book of any length")
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--lengths", type=retrieval_command.numbers(1), metavar="N,...", help="tokens of a prompt and its answer"
    )
    size.add_argument(
        "--entries",
        type=retrieval_command.numbers(3),
        default=[ENTRIES],
        metavar="N,...",
        help=f"of a book ({ENTRIES})",
    )
    retrieval_command.add_options(parser, samples=32, seeds="0,1,2,3", new_tokens=NEW_TOKENS)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Raises ValueError for options that do not fit each other or the model."""
    by_entries = args.lengths is None
    sizes, unit = (args.entries, " entries") if by_entries else (args.lengths, "")
    options = {"entries": args.entries} if by_entries else {"lengths": args.lengths}

    def book(tokenizer: Any, size: int, seed: int, index: int) -> Item:
        return item(size, seed, index, tokenizer=tokenizer, by_entries=by_entries, new_tokens=args.max_new_tokens)

    def tokens(tokenizer: Any, size: int) -> int:
        if not by_entries:
            return size
        return math.ceil(MARGIN * (len(book(tokenizer, size, 0, 0).ids) + args.max_new_tokens))

    def questions(tokenizer: Any) -> list[Question]:
        return [
            Question(f"phonebook@{size}{unit}", size, seed, index, about)
            for size in sizes
            for about in [tokens(tokenizer, size)]
            for seed in args.seeds
            for index in range(args.samples)
        ]

    made = retrieval_command.run(
        args, "phonebook", options, questions,
        lambda tokenizer, question: book(tokenizer, question.size, question.seed, question.index),
        hits, "exact_match", stop=("\n",),
    )  # fmt: skip
    retrieval_command.show(args, made, table(made), retrieval_plot.lines)


def table(report: Report) -> str:
    """A row a length: percent of the numbers that were given, and the standard deviation over the seeds."""
    rows = [["phone book", "entries", "tokens", "right, %", "over seeds", "n"]]
    for name, score in report.scores.items():
        details = report.details[name]
        deviation = "" if details["deviation"] is None else f"± {100 * details['deviation']:.1f}"
        sizes = [f"{details['units']:,}", f"{details['tokens']:,}"]
        rows.append([name.partition("@")[2], *sizes, f"{100 * score.value:.1f}", deviation, f"{score.n:,}"])
    return "\n".join(aligned(rows))
