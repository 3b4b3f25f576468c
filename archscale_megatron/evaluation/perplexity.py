"""How well does a model predict a text, with how much of it before its eyes? Perplexity in a sliding window.

A window of W tokens slides over each document. Every token but the first is scored once: those of the first window with
all that is before them, the others with at least W - STRIDE tokens before them.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from archscale_megatron import pictures
from archscale_megatron.checkpoint import agreement
from archscale_megatron.evaluation import report
from archscale_megatron.evaluation.journal import Journal
from archscale_megatron.evaluation.report import Report, Score
from archscale_megatron.evaluation.sliding_window import Losses, measure, windows_of
from archscale_megatron.evaluation.texts import Document, files_of, joined, read_documents

if TYPE_CHECKING:
    from archscale_megatron.evaluation.engine import Engine

KIND = "perplexity"
STRIDE = 256
DECIDING = ("stride", "whole_windows", "join", "raw_tokens", "documents", "max_tokens")
MANY_DOCUMENTS = 10  # from so many on, they are the units of the standard error
DRAWN_FROM = 32  # tokens of a bin; all bins are in the report


def evaluate(
    engine: Engine, documents: Sequence[Document], lengths: Sequence[int], stride: int, journal: Journal, whole: bool
) -> tuple[dict[str, Score], dict[str, Any]]:
    """Scores, and what a report tells besides, of each window length.

    Raises:
        ValueError: no document has a token to score.
    """
    from tqdm import tqdm

    scores: dict[str, Score] = {}
    details: dict[str, Any] = {}
    size = None
    if not whole and all(document.bytes is not None for document in documents):
        size = sum((d.bytes or 0) - d.head for d in documents if len(d.ids) > 1)
    for length in lengths:
        windows = [w for i, d in enumerate(documents) for w in windows_of(i, len(d.ids), length, stride, whole)]
        if not windows:
            longest = max((len(document.ids) for document in documents), default=0)
            raise ValueError(
                f"--data: nothing to score in windows of {length}; the longest document has {longest} tokens"
            )
        losses = Losses(length)
        by_document = len({window.document for window in windows}) >= MANY_DOCUMENTS
        with tqdm(
            total=sum(w.end - w.first for w in windows),
            desc=f"window {length}",
            unit="tok",
            unit_scale=True,
            disable=agreement.rank_and_size()[0] > 0 or None,
        ) as progress:
            for window, sums in measure(engine, documents, windows, journal, f"{length}", progress.update):
                block = 0 if by_document else window.first // length
                losses.add((window.document, block), window, sums)
        scores |= losses.scores(size)
        units = f"{len(losses.units)} {'documents' if by_document else f'blocks of {length} tokens'}"
        details[str(length)] = {"windows": len(windows), "stderr_over": units, "by_context": losses.by_context()}
    return scores, {"documents": len(documents), "tokens": sum(len(d.ids) for d in documents), "bytes": size} | {
        "windows": details
    }


def draw(of: Report, path: Path) -> None:
    """Write loss against the tokens before, a curve a window, and with several windows perplexity against length."""
    from matplotlib.figure import Figure

    windows = of.details["windows"]
    figure = Figure(figsize=(6.4 * (1 + (len(windows) > 1)), 4.2), dpi=150, layout="constrained")
    all_axes = figure.subplots(1, 1 + (len(windows) > 1), squeeze=False)[0]
    for i, (length, window) in enumerate(windows.items()):
        # What few tokens say would hide the rest.
        bins = [one for one in window["by_context"] if one["tokens"] >= DRAWN_FROM] or window["by_context"]
        at = [math.sqrt(one["context"][0] * max(one["context"])) for one in bins]
        loss = np.array([one["loss"] for one in bins], float)
        error = np.array([one["stderr"] or 0 for one in bins], float)
        all_axes[0].plot(at, loss, ".-", color=f"C{i}", ms=4, lw=1.2, label=f"window {int(length):,}")
        all_axes[0].fill_between(at, loss - error, loss + error, color=f"C{i}", alpha=0.2, lw=0)
    all_axes[0].set(xlabel="tokens before, in the window", ylabel="loss (nats per token)")
    if len(windows) > 1:
        all_axes[0].legend(frameon=False)
        scores = [of.scores[f"perplexity@{length}"] for length in windows]
        lengths = [int(length) for length in windows]
        all_axes[1].errorbar(
            lengths, [score.value for score in scores], [score.stderr or 0 for score in scores], fmt="o-", capsize=3
        )
        all_axes[1].set(xlabel="window (tokens)", ylabel="perplexity")
    for axes in all_axes:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.93")
    pictures.save(figure, path)


def add_commands(commands: Any) -> None:
    """`perplexity`."""
    from archscale_megatron.evaluation.options import add_engine_options

    parser = commands.add_parser(KIND, help="of local text, in a sliding window", description=__doc__)
    add_engine_options(parser)
    parser.add_argument(
        "--data", nargs="+", required=True, type=Path, metavar="FILE",
        help='UTF-8 text, .jsonl with "text" (.gz, .zst), or the prefix of an indexed dataset (.bin and .idx)',
    )  # fmt: skip
    parser.add_argument("--raw-tokens", action="store_true", help="the files are uint16 tokens, as ArchScale's")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--window", type=int, metavar="W", help="tokens the model sees at once (the trained context)")
    what.add_argument("--windows", type=_numbers, metavar="W,W", help="several: perplexity against length")
    parser.add_argument(
        "--stride", type=int, default=STRIDE, metavar="N", help=f"tokens a window goes on by ({STRIDE}; at most W - 1)"
    )
    parser.add_argument(
        "--whole-windows", action="store_true",
        help="score all tokens of each window, and so most of them several times, as ArchScale does",
    )  # fmt: skip
    parser.add_argument(
        "--join", action="store_true", help="documents are one text, with the end-of-document token between"
    )
    parser.add_argument("--documents", type=int, metavar="N", help="only the first N (all)")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="only the first N tokens (all)")
    parser.add_argument(
        "-o", dest="picture", type=Path, metavar="FILE", help="draw loss against context into this file"
    )
    report.add_output_option(parser)
    parser.set_defaults(run=_run)


def _numbers(text: str) -> list[int]:
    try:
        return sorted({int(number) for number in text.split(",")})
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give numbers with commas between, such as 1024,4096") from None


def _check(args: argparse.Namespace, lengths: Sequence[int]) -> None:
    if min(lengths) < 2:
        raise ValueError(f"--window {min(lengths)}: must be 2 or more, a token to read and one to score")
    if not 1 <= args.stride < min(lengths):
        raise ValueError(
            f"--stride {args.stride}: must be from 1 to {min(lengths) - 1}, one less than the window of {min(lengths)}"
        )


def _run(args: argparse.Namespace) -> None:
    from archscale_megatron.evaluation.options import open_engine

    lengths = args.windows or [args.window] if args.windows or args.window is not None else None
    if args.picture:
        pictures.check_path(args.picture)
    for name in ("documents", "max_tokens"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be 1 or more")
    if lengths:
        _check(args, lengths)
        if args.max_length is not None and args.max_length < max(lengths):
            raise ValueError(f"--max-length {args.max_length}: less than a window of {max(lengths)}; leave it out")
        args.max_length = max(lengths)
    options = {
        "data": [report.described_file(file) for path in args.data for file in files_of(path, args.raw_tokens)],
        "windows": lengths,
        "dtype": args.dtype,
        **{name: getattr(args, name) for name in DECIDING},
    }
    path = report.output_path(args.output, args.load, KIND, options)
    if report.shown_if_there(path, args):
        if args.picture and report.is_first_rank():
            draw(report.read(path), args.picture)
        return
    engine = open_engine(args)
    lengths = lengths or [engine.max_length]
    _check(args, lengths)
    documents = list(
        read_documents(
            args.data, engine.tokenizer, raw_tokens=args.raw_tokens, documents=args.documents, tokens=args.max_tokens
        )
    )
    if args.join:
        documents = [joined(documents, engine.end[:1])]
    header = {"options": options, "fingerprint": engine.source["fingerprint"]}
    journal = Journal(path, header, again=args.again)
    scores, details = evaluate(engine, documents, lengths, args.stride, journal, args.whole_windows)
    if agreement.rank_and_size()[0] == 0:
        written = report.write(path, kind=KIND, scores=scores, options=options, source=engine.source, details=details)
        journal.finish()
        report.show(written, args.json)
        if args.picture:
            draw(written, args.picture)
