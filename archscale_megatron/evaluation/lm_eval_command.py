"""`evaluation lm-eval`: tasks of lm-eval, with the model of a checkpoint or an export."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from archscale_megatron.checkpoint import agreement
from archscale_megatron.evaluation import report
from archscale_megatron.evaluation.journal import Journal
from archscale_megatron.evaluation.options import add_engine_options, open_engine
from archscale_megatron.evaluation.report import Score

KIND = "lm-eval"
SIZED = ("niah", "ruler")  # RULER's tasks


def add_commands(commands: Any) -> None:
    """`lm-eval`."""
    parser = commands.add_parser(KIND, help="tasks of lm-eval", description=__doc__)
    add_engine_options(parser)
    parser.add_argument("--tasks", required=True, metavar="NAME,...", help="tasks, groups, or YAML files of tasks")
    parser.add_argument("--num-fewshot", type=int, metavar="N", help="examples before each item (the task's)")
    parser.add_argument("--limit", type=float, metavar="N", help="the first N items of each task, or that share if < 1")
    parser.add_argument("--samples", type=_json, metavar="JSON", help='items by number, {"task": [0, 3]}')
    parser.add_argument("--include-path", type=Path, metavar="DIR", help="of more tasks' YAML files")
    parser.add_argument(
        "--datasets", type=Path, metavar="DIR", help="of copies of datasets, such as DIR/allenai/ai2_arc"
    )
    parser.add_argument("--metadata", type=_json, metavar="JSON", help='for tasks, {"max_seq_lengths": [4096]}')
    parser.add_argument("--apply-chat-template", action="store_true", help="the tokenizer's")
    parser.add_argument("--add-bos-token", action="store_true", default=None, help="before each text")
    parser.add_argument("--log-samples", action="store_true", help="each item's answers, in the report")
    report.add_output_option(parser)
    parser.set_defaults(run=_run)


def _json(text: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r}: give an object of JSON")
    return value


def _run(args: argparse.Namespace) -> None:
    if args.limit is not None and args.samples is not None:
        raise ValueError("--limit and --samples: give one of them")
    if not args.load.is_dir():
        raise ValueError(f"--load {args.load}: no such directory")
    options = _options(args)
    path = report.output_path(args.output, args.load, KIND, options)
    if report.shown_if_there(path, args):
        return
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with metadata(args) as given:
        manager, tasks = load_tasks(args.tasks, include_path=args.include_path, datasets=args.datasets, metadata=given)
    engine = open_engine(args)
    header = {"options": options, "fingerprint": engine.source["fingerprint"]}
    journal = Journal(path, header, again=args.again)

    import lm_eval

    from archscale_megatron.evaluation.lm_eval_model import ArchScaleLM

    model = ArchScaleLM(engine=engine, journal=journal, add_bos_token=args.add_bos_token)
    with contextlib.redirect_stdout(sys.stderr):
        results = lm_eval.simple_evaluate(
            model,
            tasks=tasks,
            num_fewshot=args.num_fewshot,
            limit=args.limit,
            samples=args.samples,
            apply_chat_template=args.apply_chat_template,
            fewshot_as_multiturn=args.apply_chat_template,
            log_samples=args.log_samples,
            task_manager=manager,
        )
    if agreement.rank_and_size()[0] == 0:
        details = {
            name: results.get(name) for name in ("versions", "n-shot", "n-samples", "samples") if name in results
        }
        written = report.write(
            path, kind=KIND, scores=scores(results), options=options, source=engine.source, details=details
        )
        report.show(written, args.json)
    journal.finish()


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """What decides the scores."""
    names = (
        "tasks", "num_fewshot", "limit", "samples", "metadata", "apply_chat_template", "add_bos_token", "log_samples",
        "dtype", "max_length",
    )  # fmt: skip
    return {name: getattr(args, name) for name in names} | {
        "include_path": args.include_path and str(args.include_path)
    }


@contextlib.contextmanager
def metadata(args: argparse.Namespace) -> Iterator[dict[str, Any] | None]:
    """`--metadata`, with the model's tokenizer for tasks that make prompts of a length."""
    if not any(name.strip().startswith(SIZED) for name in args.tasks.split(",")):
        yield args.metadata
        return
    from archscale_megatron.hf.loading import tokenizer_of

    with tempfile.TemporaryDirectory() as folder:
        tokenizer_of(args.load, args.tokenizer_model).save_pretrained(folder)
        yield {"tokenizer": folder} | (args.metadata or {})


@contextlib.contextmanager
def seeded() -> Iterator[None]:
    """The seeds of lm-eval's own program for tasks that draw their items, on every rank; our random numbers stay."""
    import numpy as np

    states = random.getstate(), np.random.get_state()
    random.seed(0)
    np.random.seed(1234)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def load_tasks(
    names: str,
    *,
    include_path: Path | None = None,
    datasets: Path | None = None,
    metadata: dict[str, Any] | None = None,
    prefix: str = "--",
) -> tuple[Any, list[Any]]:
    """lm-eval's manager of tasks, and the tasks and groups of `names`, with their data.

    Args:
        names: of tasks, groups or YAML files, with commas between them.
        include_path, datasets, metadata: what the command line has under these names.
        prefix: of the options that errors name.
    Raises:
        ValueError: there is no such task, or its data or packages are not there.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from lm_eval.tasks import TaskManager

    for option, directory in (("include-path", include_path), ("datasets", datasets)):
        if directory is not None and not directory.is_dir():
            raise ValueError(f"{prefix}{option} {directory}: no such directory")
    include = None if include_path is None else str(include_path.resolve())
    wanted = [name.strip() for name in names.split(",")]
    manager = TaskManager(include_path=include, include_defaults=False, metadata=metadata)
    if not set(wanted) <= set(manager.all_subtasks):  # to read all of lm-eval's own takes seconds
        manager = TaskManager(include_path=include, metadata=metadata)
    found: list[Any] = []
    # A dataset is looked for in the current directory before it is on the Hub.
    with contextlib.chdir(datasets or "."), seeded():
        for name in wanted:
            loaded = _task(manager, name, prefix)
            found += loaded if isinstance(loaded, list) else [loaded]
    return manager, found


def _task(manager: Any, name: str, prefix: str) -> Any:
    try:
        return manager._load_spec(name)
    except KeyError:
        raise ValueError(
            f"{prefix}tasks {name}: lm-eval has no such task; see `lm_eval ls tasks`, or give its folder by "
            f"{prefix}include-path"
        ) from None
    except ImportError as error:
        hint = "; `evaluation needles` needs neither" if name.startswith(SIZED) else ""
        raise ValueError(f"{prefix}tasks {name}: {_line(error)}{hint}") from None
    except (ConnectionError, FileNotFoundError) as error:
        raise ValueError(
            f"{prefix}tasks {name}: its dataset is not on this disk ({_line(error)}); copy the dataset's repository to "
            f"DIR/OWNER/NAME and give {prefix}datasets DIR, copy Hugging Face's cache and set HF_HOME, or give a task "
            f"with local data_files by {prefix}include-path"
        ) from None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


def scores(results: dict[str, Any]) -> dict[str, Score]:
    """Of lm-eval's results: `task/metric`, or `task/metric,filter` where a filter is not `none`."""
    found = {}
    for task, values in results["results"].items():
        for name, value in values.items():
            metric, _, kind = name.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            if metric.isdecimal() and value == -1:  # RULER's, of a length that nobody asked for
                continue
            stderr = values.get(f"{metric}_stderr,{kind}")
            found[f"{task}/{metric}" + ("" if kind == "none" else f",{kind}")] = Score(
                value=float(value),
                stderr=float(stderr) if isinstance(stderr, int | float) else None,
                n=results["n-samples"].get(task, {}).get("effective", values.get("sample_count", 0)),
                metric=metric,
                higher_is_better=results["higher_is_better"].get(task, {}).get(metric) is not False,
            )
    return found
