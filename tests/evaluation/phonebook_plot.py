"""Draws what models find in phone books: some made by hand, that copy or guess, and a trained one.

python -m tests.evaluation.phonebook_plot --load DIR -o FILE [any other option of `evaluation phonebook`]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

from archscale_megatron import pictures
from archscale_megatron.evaluation import phonebook_command, report, retrieval_command, retrieval_plot
from archscale_megatron.evaluation.options import open_engine
from tests.evaluation.answering import Copying, Random

WINDOW = 256
BY_HAND: dict[str, Callable[[Any], Any]] = {
    "copying": Copying,
    f"copying within {WINDOW} tokens": lambda tokenizer: Copying(tokenizer, window=WINDOW),
    "random": Random,
}


def main(arguments: list[str]) -> None:
    """Ask one after the other, and draw."""
    parser = argparse.ArgumentParser()
    phonebook_command.add_commands(parser.add_subparsers())
    args = parser.parse_args(["phonebook", *arguments])
    picture, args.picture = args.picture, None
    trained = open_engine(args)
    engines = {name: make(trained.tokenizer) for name, make in BY_HAND.items()}
    for name, engine in engines.items():
        engine.source = {"architecture": name, "fingerprint": name}
    reports = []
    with TemporaryDirectory() as folder:
        for name, engine in [*engines.items(), ("trained", trained)]:
            args.output = Path(folder, name)
            with mock.patch.object(retrieval_command, "open_engine", lambda args, engine=engine: engine):
                args.run(args)
            reports += [report.read(path) for path in args.output.glob("*.json")]
        pictures.save(retrieval_plot.lines(reports), picture, dpi=150)


if __name__ == "__main__":
    main(sys.argv[1:])
