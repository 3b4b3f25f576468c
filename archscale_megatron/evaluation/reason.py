"""Reasoning: several sampled answers to each question of a local file, and how many of them are right.

    python -m archscale_megatron.evaluation reason --load PATH --task aime24 --data aime24.jsonl --samples 64

Sample i of question q depends on the seed, on q and on i, so that a run which was killed goes on where it was.
The responses stay beside the report, and `--regrade` grades them again.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from archscale_megatron.checkpoint import agreement
from archscale_megatron.evaluation import report
from archscale_megatron.evaluation.engine import Engine, Sampling
from archscale_megatron.evaluation.journal import Journal
from archscale_megatron.evaluation.options import add_engine_options, open_engine
from archscale_megatron.evaluation.reason_data import (
    PLACE,
    TASKS,
    Question,
    prompt_ids,
    read_questions,
    read_template,
)
from archscale_megatron.evaluation.reason_report import grade, lines_of, read_responses

if TYPE_CHECKING:
    from archscale_megatron.evaluation.vllm_engine import VllmEngine

KIND = "reason"
MOST_SAMPLES = 2**20  # of a question
ROUND = 64  # samples of each data-parallel rank, before rank 0 writes them down


def add_commands(commands: Any) -> None:
    """`evaluation reason`."""
    parser = commands.add_parser(
        "reason", help="sampled answers to AIME, MATH-500, GPQA, GSM8K, graded", description=__doc__.splitlines()[0]
    )
    add_engine_options(parser)
    parser.add_argument("--task", required=True, choices=TASKS, help="whose form the data have, and how to grade them")
    parser.add_argument("--data", required=True, type=Path, metavar="FILE", help="questions, a line of JSON each")
    parser.add_argument("--samples", type=int, default=8, metavar="N", help="answers to each question (8)")
    parser.add_argument("--temperature", type=float, default=0.6, help="0 takes the most likely token (0.6)")
    parser.add_argument("--top-p", type=float, default=0.95, help="sample from the likeliest of this mass (0.95)")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="sample from the K likeliest (all)")
    parser.add_argument("--max-new-tokens", type=int, default=32768, metavar="N", help="of an answer (32768)")
    parser.add_argument("--stop", action="append", metavar="TEXT", help="an answer ends before it; may be given again")
    parser.add_argument("--seed", type=int, default=0, help="of the samples (0)")
    parser.add_argument("--system", metavar="TEXT", help="system message; without a chat template it stands in front")
    parser.add_argument("--prompt-template", type=Path, metavar="FILE", help=f"own prompt, with {PLACE} in it")
    parser.add_argument(
        "--chat-template", choices=("auto", "on", "off"), default="auto", help="auto where the tokenizer has one"
    )
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers", help="(transformers)")
    parser.add_argument("--regrade", action="store_true", help="grade the responses of an earlier run again")
    report.add_output_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """The command."""
    check(args)
    questions, template = read_questions(args.data, args.task), read_template(args.prompt_template, args.task)
    options = _options(args, template)
    path = report.output_path(args.output, args.load, KIND, options)
    journal = None
    if args.regrade:
        samples, source = read_responses(path, len(questions))
    else:
        if report.shown_if_there(path, args):
            return
        engine = _open(args)
        source = engine.source
        journal = Journal(path, {"options": options, "fingerprint": source["fingerprint"]}, again=args.again)
        generate(engine, questions, template, args, journal)
        samples = [[journal.done[_key(q, i)] for i in range(args.samples)] for q in range(len(questions))]
    if int(os.environ.get("RANK", "0")) > 0:
        return
    scores, details = grade(args.task, questions, samples, path, source, options)
    written = report.write(path, kind=KIND, scores=scores, options=options, source=source, details=details)
    if journal is not None:
        journal.finish()
    report.show(written, args.json)
    if not args.json:
        print("\n".join(lines_of(details)))


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for a number that is out of range."""
    if not 1 <= args.samples < MOST_SAMPLES:
        raise ValueError(f"--samples {args.samples}: must be from 1 to {MOST_SAMPLES - 1}")
    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens {args.max_new_tokens}: must be 1 or more")
    if not args.temperature >= 0:
        raise ValueError(f"--temperature {args.temperature}: must be 0 or more")
    if args.temperature == 0 and args.samples > 1:
        raise ValueError(f"--samples {args.samples}: at --temperature 0 all are the same; give --samples 1")
    if not 0 < args.top_p <= 1:
        raise ValueError(f"--top-p {args.top_p}: must be above 0 and at most 1")
    if args.top_k < 0:
        raise ValueError(f"--top-k {args.top_k}: must be 0, which is all, or more")


def _options(args: argparse.Namespace, template: str) -> dict[str, Any]:
    names = ["task", "samples", "temperature", "top_p", "top_k", "max_new_tokens", "stop", "seed", "system"]
    names += ["chat_template", "engine", "dtype", "max_length"]
    given = {name: getattr(args, name) for name in names}
    return given | {"data": report.described_file(args.data), "prompt": template}


def _open(args: argparse.Namespace) -> Engine | VllmEngine:
    if args.engine == "transformers":
        return open_engine(args)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("--engine vllm: vLLM starts its processes itself; run this without torchrun")
    from archscale_megatron.evaluation.vllm_engine import open_export

    return open_export(
        args.load,
        dtype=args.dtype,
        max_length=args.max_length,
        tensor_parallel_size=args.tensor_model_parallel_size,
    )


def generate(
    engine: Engine | VllmEngine,
    questions: Sequence[Question],
    template: str,
    args: argparse.Namespace,
    journal: Journal,
) -> None:
    """Make the samples that the journal lacks; data-parallel ranks divide them.

    Raises:
        ValueError: a question leaves no room for an answer.
    """
    from tqdm import tqdm

    texts = [template.replace(PLACE, question.problem) for question in questions]
    prompts = [prompt_ids(engine.tokenizer, text, args.system, args.chat_template) for text in texts]
    sampling = Sampling(
        max_new_tokens=_room(prompts, engine.max_length, args.max_new_tokens),
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        stop=tuple(args.stop or ()),
        seed=args.seed,
    )
    every = [(q, i) for q in range(len(questions)) for i in range(args.samples)]
    missing = [pair for pair in every if _key(*pair) not in journal.done]
    quiet = None if agreement.rank_and_size()[0] == 0 else True
    with tqdm(total=len(every), initial=len(every) - len(missing), unit="sample", disable=quiet) as progress:
        for part in _parts(missing, engine.world_size):
            mine = part[engine.rank :: engine.world_size]
            numbers = [q * MOST_SAMPLES + i for q, i in mine]
            ended = engine.generate([prompts[q] for q, _ in mine], sampling, numbers)
            records: Iterator[tuple[str, dict[str, Any]]] = (
                (_key(*mine[at]), {"text": one.text, "tokens": len(one.ids), "ended": one.ended}) for at, one in ended
            )
            if engine.world_size > 1:
                records = itertools.chain.from_iterable(agreement.of_all_ranks(list(records)))
            for key, record in records:
                if key not in journal.done:
                    journal.append(key, record)
                    progress.update()


def _key(question: int, sample: int) -> str:
    return f"{question}:{sample}"


def _parts(missing: list[tuple[int, int]], ranks: int) -> Iterator[list[tuple[int, int]]]:
    """All at once for one rank, which hands on what ends; a round at a time for several."""
    size = max(1, len(missing)) if ranks == 1 else ROUND * ranks
    for first in range(0, len(missing), size):
        yield missing[first : first + size]


def _room(prompts: Sequence[Sequence[int]], max_length: int, asked: int) -> int:
    """New tokens of every answer: as asked, or what the longest question leaves of the model's length."""
    longest = max(range(len(prompts)), key=lambda q: len(prompts[q]))
    room = max_length - len(prompts[longest])
    if room < 1:
        raise ValueError(
            f"--data: question {longest + 1} has {len(prompts[longest])} tokens, of {max_length} that a sequence may "
            "have; give a larger --max-length, or leave the question out"
        )
    if room < asked and agreement.rank_and_size()[0] == 0:
        print(f"reason: note: answers end after {room} tokens, where the longest reaches {max_length}", file=sys.stderr)
    return min(room, asked)
