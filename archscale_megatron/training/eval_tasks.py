"""Tasks of lm-eval that are scored during training, where Megatron evaluates: `--eval-tasks`.

The model in training computes them, at its layout. Training goes on as if it had not.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OPTIONS = ("eval_limit", "eval_include_path", "eval_datasets")


@dataclass
class _Loaded:
    """
    Attributes:
        tasks: lm-eval's TaskDict.
        tokenizer, end: of an `Engine`.
        last: the iteration that was scored last.
    """

    tasks: dict[str, Any]
    tokenizer: Any
    end: tuple[int, ...]
    last: int | None = None


_loaded: _Loaded | None = None


def add_options(group: Any) -> None:
    """Add `--eval-tasks`, and what says more of them, to a group of argparse's."""
    group.add_argument("--eval-tasks", metavar="NAME,...", help="tasks of lm-eval, scored at each --eval-interval")
    group.add_argument(
        "--eval-limit", type=float, metavar="N", help="the first N items of each of them, or that share if < 1 (all)"
    )
    group.add_argument("--eval-include-path", metavar="DIR", help="of more tasks' YAML files")
    group.add_argument("--eval-datasets", metavar="DIR", help="of copies of datasets, such as DIR/allenai/ai2_arc")


def check_options(args: argparse.Namespace) -> None:
    """Raises ValueError if tasks are never scored, or options are of no tasks."""
    if args.eval_tasks is None:
        for name in OPTIONS:
            if getattr(args, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} has no effect without --eval-tasks")
        return
    if args.eval_limit is not None and not args.eval_limit > 0:
        raise ValueError(f"--eval-limit {args.eval_limit:g}: must be above 0")
    if not (args.eval_iters or args.full_validation):
        raise ValueError("--eval-tasks: scored where validation is, and there is none; give --eval-iters 1 or more")
    shares = [float(share) for share in (args.split or "").split(",") if share.strip()]
    if shares and not any(shares[1:2]):
        raise ValueError(f"--eval-tasks: scored where validation is, and --split {args.split} leaves no data for it")


def load(args: argparse.Namespace) -> None:
    """Load the tasks of `--eval-tasks`, and the tokenizer in which they are scored.

    Raises:
        ValueError: a task, its data or lm-eval is not there, or the tokenizer has no text.
    """
    global _loaded
    if args.eval_tasks is None:
        return
    if args.tokenizer_type == "NullTokenizer":
        raise ValueError("--eval-tasks: texts need a tokenizer, and --tokenizer-type NullTokenizer is none")
    try:
        from archscale_megatron.evaluation.lm_eval_command import load_tasks
    except ImportError as error:
        raise ValueError(f"--eval-tasks: {error}; install lm-eval") from None
    from archscale_megatron.checkpoint import run_description
    from archscale_megatron.hf.folder import HFError
    from archscale_megatron.hf.loading import tokenizer_of_run

    include_path, datasets = (None if p is None else Path(p) for p in (args.eval_include_path, args.eval_datasets))
    manager, found = load_tasks(args.eval_tasks, include_path=include_path, datasets=datasets, prefix="--eval-")
    tasks = manager.load(found)
    for task in tasks["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    path = Path(args.tokenizer_model or args.tokenizer_type)
    try:
        tokenizer, end = tokenizer_of_run(run_description.describe(args, 0), path, None)
    except HFError as error:
        raise ValueError(f"--eval-tasks: {error}") from None
    _loaded = _Loaded(tasks, tokenizer, end)


def score(chunks: Sequence[Any], iteration: int) -> None:
    """Score the tasks with the model in training, and log what they give; called on all ranks, once an iteration."""
    if _loaded is None or _loaded.last == iteration:
        return
    _loaded.last = iteration

    from lm_eval.evaluator import evaluate
    from megatron.training import get_args

    from archscale_megatron.evaluation.lm_eval_command import scores
    from archscale_megatron.evaluation.lm_eval_model import ArchScaleLM
    from archscale_megatron.evaluation.megatron_engine import MegatronEngine

    args = get_args()
    with undisturbed(chunks), quiet():
        for task in _loaded.tasks["tasks"].values():
            task.set_fewshot_seed(args.seed)  # the same examples each time
        engine = MegatronEngine(
            chunks,
            tokenizer=_loaded.tokenizer,
            end=_loaded.end,
            max_length=args.seq_length,
            source={"path": args.save, "iteration": iteration, "fingerprint": None},
            batch_tokens=args.micro_batch_size * args.seq_length,
        )
        model = ArchScaleLM(engine=engine)
        results = evaluate(model, _loaded.tasks, limit=args.eval_limit, bootstrap_iters=0, log_samples=False)
    log({name: found.value for name, found in scores(results).items()}, iteration)


def log(scores: dict[str, float], iteration: int) -> None:
    """A line, and `eval/TASK/METRIC` in TensorBoard and W&B."""
    from megatron.training import get_tensorboard_writer, get_wandb_writer
    from megatron.training.utils import print_rank_last

    line = " | ".join(f"{name}: {value:.6E}" for name, value in scores.items())
    print_rank_last(f" iteration {iteration:8d} | {line}")
    scalars = {f"eval/{name}": value for name, value in scores.items()}
    if writer := get_tensorboard_writer():
        for name, value in scalars.items():
            writer.add_scalar(name, value, iteration)
    if wandb := get_wandb_writer():
        wandb.log(scalars, iteration)


@contextlib.contextmanager
def undisturbed(chunks: Sequence[Any]) -> Iterator[None]:
    """Inside, the model is in evaluation mode; behind, all is as it was: modes, timers, and every random state.

    What is computed must be without gradients. Overlapped gathering of parameters is to be off, as it is where Megatron
    evaluates.
    """
    import numpy as np
    import torch
    from megatron.core.tensor_parallel import get_cuda_rng_tracker
    from megatron.core.utils import get_model_config

    config, tracker = get_model_config(chunks[0]), get_cuda_rng_tracker()
    timers, config.timers = config.timers, None
    modes = [(module, module.training) for chunk in chunks for module in chunk.modules()]
    python, numpy, cpu, cuda = (
        random.getstate(),
        np.random.get_state(),
        torch.get_rng_state(),
        torch.cuda.get_rng_state(),
    )
    own = {name: state.clone() for name, state in tracker.get_states().items()}
    for chunk in chunks:
        chunk.eval()
    try:
        yield
    finally:
        config.timers = timers
        for module, training in modes:
            module.training = training
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        torch.cuda.set_rng_state(cuda)
        tracker.set_states(own)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without lm-eval's progress bars, one a rank."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield
