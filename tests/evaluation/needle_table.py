"""Which part of the needles and phone books an oracle, a model that copies, one that guesses and a trained one find.

    python -m tests.evaluation.needle_table --load DIR [--lengths 1024,2048] [--samples 20] [--haystack FILE]

Prints a table in Markdown, percent, a row a task and length. The copying model, whose attention is set by hand, is
asked about phone books only: what RULER's question ends with is not what stands before a needle's value.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from archscale_megatron.command_line import Parser
from archscale_megatron.evaluation import needles, phonebook
from archscale_megatron.evaluation.contexts import Item
from archscale_megatron.evaluation.engine import Sampling
from archscale_megatron.evaluation.options import add_engine_options, open_engine
from archscale_megatron.evaluation.retrieval import Question, ask, summary
from archscale_megatron.evaluation.retrieval_command import numbers, positive
from tests.evaluation.answering import Copying, Random, Texts, oracle

ROOT = Path(__file__).resolve().parents[2]


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = Parser(prog="needle_table", description=__doc__.splitlines()[0])
    add_engine_options(parser)
    parser.add_argument("--lengths", type=numbers(1), default=[1024, 2048])
    parser.add_argument("--samples", type=positive, default=20)
    parser.add_argument("--haystack", type=Path, default=ROOT / "docs" / "architecture.md")
    args = parser.parse_args(arguments)
    trained = open_engine(args)
    haystack = needles.Haystack(args.haystack.read_text("utf-8"))
    names = ["oracle", "copying", "random", trained.source.get("architecture") or "trained"]
    print(f"| task | tokens | {' | '.join(names)} |\n|---|{'---:|' * (len(names) + 1)}")
    for task in [*needles.TASKS, "phonebook"]:
        for length in args.lengths:
            asked = [Question(f"{task}@{length}", length, 0, index, length) for index in range(args.samples)]
            cells = []
            for engine in (
                Texts(trained.tokenizer, oracle),
                Copying(trained.tokenizer),
                Random(trained.tokenizer),
                trained,
            ):
                copying_needles = isinstance(engine, Copying) and task != "phonebook"
                cells.append("" if copying_needles else f"{100 * found(engine, asked, haystack):.0f}")
            print(f"| {task} | {length:,} | {' | '.join(cells)} |", flush=True)


def found(engine: Any, asked: list[Question], haystack: needles.Haystack) -> float:
    """The score of an engine."""

    def make(one: Question) -> Item:
        if one.group.startswith("phonebook"):
            return phonebook.item(one.size, one.seed, one.index, tokenizer=engine.tokenizer)
        task = one.group.partition("@")[0]
        return needles.item(task, one.size, one.seed, one.index, tokenizer=engine.tokenizer, haystack=haystack)

    book = asked[0].group.startswith("phonebook")
    sampling = Sampling(phonebook.NEW_TOKENS, stop=("\n",)) if book else Sampling(needles.NEW_TOKENS)
    done: dict[str, Any] = {}
    journal: Any = SimpleNamespace(done=done, append=done.__setitem__)
    ask(engine, asked, make, phonebook.hits if book else needles.hits, sampling, journal)
    (score,) = summary(asked, done, "found")[0].values()
    return score.value


if __name__ == "__main__":
    main()
