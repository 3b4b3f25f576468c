"""JSONL to Megatron's indexed dataset: read, tokenize in threads, write in order.

Batches of about 1 MiB go through `workers` threads (the tokenizers release the GIL), at most `workers` + 2 of
them at a time, so memory does not grow with the input.
"""

import argparse
import os
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from archscale_megatron.data.gigatoken_bpe import NotExactError
from archscale_megatron.data.indexed import IndexedDatasetWriter, publish
from archscale_megatron.data.jsonl import Batch, DataError, expand, read_batches, text_fields
from archscale_megatron.data.tokenization import (
    BACKENDS,
    TOKENIZER_TYPES,
    Ids,
    Tokenizer,
    TokenizerError,
    load_tokenizer,
)

_CHECK_EVERY = 500  # lines; the fast path runs some 80 times faster than its reference


@dataclass
class Encoded:
    """One batch: for every key the ids [tokens] and lengths [documents] (no key if it has no document)."""

    columns: list[tuple[Ids, Ids]]
    bad: list[str]
    stored_bytes: int


@dataclass
class Result:
    """What was written."""

    writers: list[IndexedDatasetWriter]
    bad_lines: int = 0
    first_bad_line: str = ""


def parser() -> argparse.ArgumentParser:
    """The command line; names are those of Megatron-LM's tools/preprocess_data.py where it has the option."""
    parser = argparse.ArgumentParser(
        description="Tokenize JSONL into Megatron's indexed dataset, {output-prefix}_{key}_document.bin and .idx."
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="files or globs: .jsonl, .jsonl.gz, .jsonl.zst",
    )
    data.add_argument("--json-keys", nargs="+", default=["text"], metavar="KEY", help="one dataset per key (text)")
    data.add_argument("--output-prefix", required=True, help="path of the output without _{key}_document.bin")
    data.add_argument("--overwrite", action="store_true", help="replace existing output")
    data.add_argument(
        "--on-bad-line",
        choices=("stop", "skip"),
        default="stop",
        help="a line that is not JSON or lacks text under a key: stop at it (default), or skip and count it",
    )
    tokens = parser.add_argument_group("tokenizer")
    tokens.add_argument("--tokenizer-type", choices=TOKENIZER_TYPES, required=True)
    tokens.add_argument("--tokenizer-model", help="a Hugging Face directory or name, or a SentencePiece .model file")
    tokens.add_argument("--append-eod", action="store_true", help="end every document with the end token")
    tokens.add_argument(
        "--backend",
        choices=BACKENDS,
        default="auto",
        help="auto: gigatoken for a Hugging Face BPE whose ids it reproduces; tokenizers: never gigatoken",
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="tokenizing threads (all cores)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    args = parser().parse_args(argv)
    try:
        result = preprocess(args)
    except (DataError, TokenizerError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    for writer in result.writers:
        print(f"{writer.prefix}: {writer.documents} documents, {writer.tokens} tokens, {writer.dtype}")
    if result.bad_lines:
        print(f"skipped {result.bad_lines} bad lines, the first: {result.first_bad_line}", file=sys.stderr)
    return 0


def preprocess(args: argparse.Namespace) -> Result:
    """Write the datasets that `args` (of `parser`) ask for.

    Raises DataError or TokenizerError with one line for the user, and then leaves nothing behind.
    """
    if args.workers < 1:
        raise DataError(f"--workers {args.workers}: give 1 or more")
    if len(set(args.json_keys)) < len(args.json_keys):
        raise DataError(f"--json-keys {' '.join(args.json_keys)}: give each key once")
    prefixes = [f"{args.output_prefix}_{key}_document" for key in args.json_keys]
    for path in (prefix + suffix for prefix in prefixes for suffix in (".bin", ".idx")):
        if os.path.exists(path) and not args.overwrite:
            raise DataError(f"{path} exists; choose another --output-prefix, or replace it with --overwrite")
    paths = expand(args.input)
    tokenizer = load_tokenizer(args.tokenizer_type, args.tokenizer_model, args.backend)
    if args.append_eod and tokenizer.eod is None:
        raise TokenizerError(f"--append-eod: the tokenizer {args.tokenizer_model} has no end token (eos)")
    os.makedirs(os.path.dirname(args.output_prefix) or ".", exist_ok=True)
    try:
        return _write(args, tokenizer, paths, prefixes)
    except NotExactError as error:
        print(f"gigatoken: {error}; starting again with tokenizers, which is slower", file=sys.stderr)
        tokenizer = load_tokenizer(args.tokenizer_type, args.tokenizer_model, "tokenizers")
        return _write(args, tokenizer, paths, prefixes)


def _write(args: argparse.Namespace, tokenizer: Tokenizer, paths: list[str], prefixes: list[str]) -> Result:
    writers = [IndexedDatasetWriter(prefix, tokenizer.vocab_size) for prefix in prefixes]
    result = Result(writers)
    size = sum(os.path.getsize(path) for path in paths)
    try:
        with tqdm(total=size, unit="B", unit_scale=True, desc=tokenizer.backend, mininterval=0.5) as bar:
            for encoded in _encoded(args, tokenizer, paths):
                result.bad_lines += len(encoded.bad)
                result.first_bad_line = result.first_bad_line or next(iter(encoded.bad), "")
                for writer, (ids, lengths) in zip(writers, encoded.columns, strict=False):
                    try:
                        writer.write(ids, lengths)
                    except ValueError as error:
                        raise TokenizerError(f"--tokenizer-model {args.tokenizer_model}: {error}") from error
                bar.set_postfix_str(f"{writers[0].documents} documents, {writers[0].tokens} tokens", refresh=False)
                bar.update(encoded.stored_bytes)
        for writer in writers:
            if not writer.tokens:
                raise DataError(
                    f"no tokens for {writer.prefix}: {' '.join(args.input)} has {writer.documents} documents"
                    f" with text and {result.bad_lines} bad lines"
                )
            writer.finish()
        publish(writers)
    finally:
        for writer in writers:
            writer.discard()
    return result


def _encoded(args: argparse.Namespace, tokenizer: Tokenizer, paths: list[str]) -> Iterator[Encoded]:
    """The batches of `paths`, encoded in threads, in order."""
    eod = tokenizer.eod if args.append_eod else None
    waiting: deque[Future[Encoded]] = deque()
    pool = ThreadPoolExecutor(args.workers)
    try:
        for batch in read_batches(paths):
            waiting.append(pool.submit(_encode, batch, tokenizer, args.json_keys, eod, args.on_bad_line))
            if len(waiting) > args.workers + 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _encode(batch: Batch, tokenizer: Tokenizer, keys: Sequence[str], eod: int | None, on_bad_line: str) -> Encoded:
    rows, bad, sampled = [], [], []
    for number, line in enumerate(batch.lines, batch.first_line):
        if line is not None and not line.strip():
            continue
        try:
            rows.append(text_fields(line, keys))
        except ValueError as error:
            bad.append(f"{batch.path}:{number}: {error}")
            if on_bad_line == "stop":
                raise DataError(bad[0] + "; --on-bad-line skip passes over such lines") from error
            continue
        if number % _CHECK_EVERY == 1:
            sampled.append(len(rows) - 1)
    columns = []
    for texts in zip(*rows, strict=True):
        ids, lengths = tokenizer.encode(texts)
        ends = np.cumsum(lengths)
        for i in sampled:
            tokenizer.check(texts[i], ids[ends[i] - lengths[i] : ends[i]])
        if eod is not None:
            ids = np.insert(ids, ends[lengths > 0], eod)
            lengths = lengths + (lengths > 0)
        columns.append((ids, lengths))
    return Encoded(columns, bad, batch.stored_bytes)
