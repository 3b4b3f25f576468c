"""What the commands `needles` and `phonebook` have in common: options, and the way from a model to a report."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from archscale_megatron import pictures
from archscale_megatron.checkpoint import agreement
from archscale_megatron.evaluation import report
from archscale_megatron.evaluation.contexts import Item
from archscale_megatron.evaluation.journal import Journal
from archscale_megatron.evaluation.options import add_engine_options, open_engine
from archscale_megatron.evaluation.retrieval import Question, ask, summary


def add_options(parser: argparse.ArgumentParser, *, samples: int, seeds: str, new_tokens: int) -> None:
    """Those of the engine and of the report, `--samples`, `--seeds`, `--max-new-tokens` and `-o`, with defaults."""
    add_engine_options(parser)
    parser.add_argument(
        "--samples", type=positive, default=samples, metavar="N", help=f"items of each seed and length ({samples})"
    )
    parser.add_argument(
        "--seeds", type=numbers(0), default=numbers(0)(seeds), metavar="N,...", help=f"of the items ({seeds})"
    )
    parser.add_argument(
        "--max-new-tokens", type=positive, default=new_tokens, metavar="N", help=f"of an answer ({new_tokens})"
    )
    parser.add_argument("-o", dest="picture", type=Path, metavar="FILE", help="picture to draw as well, such as a .png")
    report.add_output_option(parser)


def positive(text: str) -> int:
    """The type of an option: a whole number of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: give a whole number of 1 or more")
    return int(text)


def numbers(least: int) -> Callable[[str], list[int]]:
    """The type of an option: different whole numbers with commas between them, none less than `least`."""

    def parse(text: str) -> list[int]:
        try:
            values = [int(part) for part in text.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}: give whole numbers with commas between them") from None
        if min(values) < least:
            raise argparse.ArgumentTypeError(f"{text}: each must be {least} or more")
        if len(set(values)) < len(values):
            raise argparse.ArgumentTypeError(f"{text}: give each number once")
        return values

    return parse


def run(
    args: argparse.Namespace,
    kind: str,
    options: dict[str, Any],
    questions: Callable[[Any], list[Question]],
    make: Callable[[Any, Question], Item],
    hits: Callable[[str, Item], list[bool]],
    metric: str,
    stop: tuple[str, ...] = (),
) -> report.Report:
    """The report of these options: the one that is there, or a new one.

    Args:
        options: all that decides the numbers.
        questions, make: of a tokenizer.
    Raises:
        ValueError: a length is beyond the model's, or leaves no place for what is hidden.
    """
    from archscale_megatron.evaluation.engine import Sampling

    if args.picture:
        pictures.check_path(args.picture)
    options |= {
        "samples": args.samples,
        "seeds": args.seeds,
        "max_new_tokens": args.max_new_tokens,
        "dtype": args.dtype,
    }
    path = report.output_path(args.output, args.load, kind, options)
    if path.is_file() and not args.again:
        if not args.json and report.is_first_rank():
            print(f"{path} is there already; --again computes it anew")
        return report.read(path)
    engine = open_engine(args)
    asked = questions(engine.tokenizer)
    longest = max(question.tokens for question in asked)
    if longest > engine.max_length:
        raise ValueError(
            f"{kind} of {longest} tokens: {'--max-length is' if args.max_length else 'the model was trained on'} "
            f"{engine.max_length}; give shorter ones, or --max-length {longest}"
        )
    for _, group in itertools.groupby(asked, key=lambda question: question.group):
        make(engine.tokenizer, next(group))  # what is too short for its needles is so before the work
    journal = Journal(path, {"options": options, "fingerprint": engine.source["fingerprint"]}, again=args.again)
    sampling = Sampling(max_new_tokens=args.max_new_tokens, stop=stop)
    ask(engine, asked, lambda question: make(engine.tokenizer, question), hits, sampling, journal)
    scores, details = summary(asked, journal.done, metric)
    if report.is_first_rank():
        report.write(path, kind=kind, scores=scores, options=options, source=engine.source, details=details)
    journal.finish()
    agreement.of_first_rank(None)  # nobody reads it before it is written
    return report.read(path)


def show(args: argparse.Namespace, made: report.Report, table: str, draw: Callable[[list[report.Report]], Any]) -> None:
    """Print the table, or the report for machines, and draw the picture that was asked for. Rank 0 does."""
    if not report.is_first_rank():
        return
    print(made.path.read_text("utf-8").rstrip("\n") if args.json else f"{table}\n{made.path}")
    if args.picture:
        pictures.save(draw([made]), args.picture, dpi=150)
