"""Megatron's hyperparameters from ArchScale's base hyperparameters, by the transfer laws of `mup.transfer`.

With `--train-name`, `--parametrization` or any `--base-hps.*` the laws say what the user does not; what he says
enters them. Without one of these, Megatron's flags stand as they are.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from archscale_megatron.archs.architecture import Architecture
from archscale_megatron.mup.rules import Name, Parametrization, Release
from archscale_megatron.mup.transfer import (
    BASES,
    INDEPENDENT_WEIGHT_DECAY,
    BaseHyperparameters,
    Hyperparameters,
    option,
    rounded_batch,
    target_tokens,
    transfer,
)
from archscale_megatron.training.spellings import DESTS

SEED = 3407  # ArchScale's
CLIP = 1.0
STABLE = 5 / 7  # of what follows the warm-up, in ArchScale's warm-up, stable, decay


def set_hyperparameters(args: argparse.Namespace, arch: Architecture, explicit: dict[str, str]) -> None:
    """Set Megatron's hyperparameters and the length of the run, `args.parametrization` and `args.hyperparameters`.

    Without a law that is asked for the latter is None, and the former what it was.

    Args:
        args: changed in place; the layout and the micro batch must be set.
        explicit: attribute -> option, of what the user or the run name gave.
    Raises:
        ValueError: not a number, a batch that cannot be, no law, or a contradiction.
    """
    given = {field: getattr(args, name) for field, name in DESTS.items() if name in explicit}
    laws = bool(given) or args.train_name is not None or "parametrization_name" in explicit
    run, base = _parametrization(args, arch, given)
    args.hyperparameters = None
    if laws:
        _check_optimizer(args.optimizer, run)
        args.parametrization = run
    ranks = args.world_size // (args.tensor_model_parallel_size * args.pipeline_model_parallel_size)
    unit = args.micro_batch_size * ranks  # sequences of one micro batch on every rank
    batch = _given_batch(args, explicit, unit, run)
    if batch is None and laws:
        batch = rounded_batch(base.b0, unit * args.seq_length, run.release)
    if batch is not None:
        args.global_batch_size = batch // args.seq_length
    tokens = _given_tokens(args, explicit, batch or unit * args.seq_length)
    if not laws:
        if "max_tokens" in explicit:
            _set_length(args, explicit, tokens, unit)  # type: ignore[arg-type]
        return
    assert batch is not None
    if tokens is None:
        tokens = target_tokens(base, arch, run.release, args.count_embeddings)
    if tokens < batch:
        raise ValueError(f"a run of {tokens:,} tokens is less than one batch of {batch:,}; give more, or a smaller one")
    found = transfer(
        base,
        run,
        arch,
        batch_tokens=batch,
        train_tokens=tokens,
        learning_rate=args.lr if "lr" in explicit else None,
    )
    values = {
        "lr": found.learning_rate, "min_lr": found.min_learning_rate, "weight_decay": found.weight_decay,
        "adam_beta1": found.adam_beta1, "adam_beta2": found.adam_beta2, "adam_eps": found.adam_eps,
        "muon_momentum": found.muon_momentum, "clip_grad": CLIP, "seed": SEED,
    }  # fmt: skip
    for name, value in values.items():
        if name not in explicit:
            setattr(args, name, value)
    _set_length(args, explicit, tokens, unit)
    warmup = _set_warmup_and_decay(args, explicit, found, unit)
    args.hyperparameters = dataclasses.replace(found, min_learning_rate=args.min_lr, warmup_tokens=warmup)
    if args.rank == 0:
        print(report(args))


def _parametrization(
    args: argparse.Namespace, arch: Architecture, given: dict[str, Any]
) -> tuple[Parametrization, BaseHyperparameters]:
    name: Name = args.parametrization_name or "sp"
    release: Release = args.archscale_release or ("2026-03" if name == "hyperp" else "2025-07")
    if args.independent_weight_decay:
        given = {"weight_decay0": INDEPENDENT_WEIGHT_DECAY} | given
    base = dataclasses.replace(BASES[release], **given)
    run = Parametrization(
        name,
        width_ratio=arch.depth / base.d0,  # the width is in proportion to the depth
        base_head_dim=base.hd0,
        init_scale=base.w_init0,
        release=release,
        muon="muon" in args.optimizer,
        independent_weight_decay=args.independent_weight_decay,
    )
    return run, base


def _check_optimizer(optimizer: str, run: Parametrization) -> None:
    """Raises ValueError for MuonH without HyperP's rules, or the other way round."""
    if (optimizer == "muonh") != (run.name == "hyperp"):
        raise ValueError(
            f"--optimizer {optimizer} and the parametrization {run.name}: muonh and hyperp belong together; "
            "say muonh in --train-name, or give both"
        )


def _given_batch(args: argparse.Namespace, explicit: dict[str, str], unit: int, run: Parametrization) -> int | None:
    """Tokens of a batch that the user asks for; None if he does not."""
    names = [name for name in ("global_batch_size", "total_bsz", "step_batch_size_schedule") if name in explicit]
    if len(names) > 1:
        raise ValueError(f"{' and '.join(explicit[name] for name in names)} say the same; give one of them")
    if not names:
        return None
    if names == ["total_bsz"]:
        return rounded_batch(args.total_bsz, unit * args.seq_length, run.release)
    if names == ["step_batch_size_schedule"]:
        return _last_batch(args.step_batch_size_schedule, unit) * args.seq_length
    return args.global_batch_size * args.seq_length


def _last_batch(schedule: str, unit: int) -> int:
    """Sequences of the last of Megatron's "TOKENS:SEQUENCES ..."; ValueError if a batch of them cannot be divided."""
    from megatron.core.num_microbatches_calculator import StepBatchsizeNumMicroBatchesCalculator as Calculator

    try:
        batches = [batch for _, batch in Calculator._parse_schedule(schedule, None)]
    except ValueError as error:
        raise ValueError(f"--step-batch-size-schedule {schedule}: {error}") from None
    for batch in batches:
        if batch < 1 or batch % unit:
            raise ValueError(
                f"--step-batch-size-schedule {schedule}: {batch} must be a multiple of micro batch x data parallel "
                f"size, {unit}"
            )
    return batches[-1]


def _given_tokens(args: argparse.Namespace, explicit: dict[str, str], batch: int) -> int | None:
    """Tokens of the run that the user asks for; None if he does not."""
    names = [name for name in ("train_iters", "train_samples", "max_tokens") if name in explicit]
    if len(names) > 1:
        raise ValueError(f"give one of {' and '.join(explicit[name] for name in names)}")
    if not names:
        return None
    if names == ["max_tokens"]:
        return args.max_tokens
    return args.train_iters * batch if names == ["train_iters"] else args.train_samples * args.seq_length


ITERATIONS = ("train_iters", "lr_warmup_iters", "lr_decay_iters", "lr_wsd_decay_iters")


def _set_length(args: argparse.Namespace, explicit: dict[str, str], tokens: int, unit: int) -> None:
    """Sequences, whole micro batches of all ranks as in ArchScale; or steps, where the user counts in these."""
    if "train_iters" in explicit or "train_samples" in explicit:
        return
    if any(name in explicit for name in ITERATIONS):
        args.train_iters = tokens // (args.global_batch_size * args.seq_length)
    else:
        args.train_samples = tokens // args.seq_length // unit * unit


def _set_warmup_and_decay(args: argparse.Namespace, explicit: dict[str, str], found: Hyperparameters, unit: int) -> int:
    """What of the schedule the user did not give, in his unit: steps or sequences. Returns the warm-up in tokens."""
    kind, step = ("iters", found.global_batch_tokens) if args.train_iters else ("samples", args.seq_length)
    grain = 1 if args.train_iters else unit
    length = getattr(args, f"train_{kind}")
    warmup, decay, last = f"lr_warmup_{kind}", f"lr_decay_{kind}", f"lr_wsd_decay_{kind}"
    tokens = found.warmup_tokens
    if args.lr_warmup_fraction is not None:
        tokens = round(args.lr_warmup_fraction * length * step)
    elif warmup in explicit:
        tokens = getattr(args, warmup) * step
    else:
        if tokens // step >= length:
            raise ValueError(
                f"a warm-up of {tokens:,} tokens is no shorter than the run, {found.train_tokens:,} tokens; give a "
                f"smaller {option('warmup_tokens0')}"
            )
        setattr(args, warmup, tokens // step // grain * grain)
    if decay not in explicit:
        setattr(args, decay, length)
    if args.lr_decay_style == "WSD":
        if "lr_wsd_decay_style" not in explicit:
            args.lr_wsd_decay_style = "linear"
        if last not in explicit:
            end = getattr(args, decay)
            after = end - tokens // step // grain * grain
            setattr(args, last, after - int(STABLE * (after // grain)) * grain)
    return tokens


def report(args: argparse.Namespace) -> str:
    """The run's hyperparameters, to be read; `set_hyperparameters` must have found some."""
    found, run = args.hyperparameters, args.parametrization
    steps = args.train_iters or args.train_samples // args.global_batch_size
    rows = [
        ("learning rate", f"{args.lr:.4e}, of matrices {found.matrix_learning_rate:.4e}"),
        ("", f"{args.lr_decay_style} to {args.min_lr:g}"),
        ("warm-up", f"{found.warmup_tokens:,} tokens"),
        ("batch", f"{found.global_batch_tokens:,} tokens, {args.global_batch_size:,} sequences"),
        ("training", f"{found.train_tokens:,} tokens, {steps:,} steps"),
        ("weight decay", f"{args.weight_decay:g}"),
        ("Adam", f"betas {args.adam_beta1:g} and {args.adam_beta2:g}, eps {args.adam_eps:g}"),
        ("", f"gradients clipped to {args.clip_grad:g}, seed {args.seed}"),
    ]
    title = f"{run.name} of ArchScale {run.release}, at {run.width_ratio:g} times the base model's width:"
    return "\n".join([title, *(f"  {name:15}{value}" for name, value in rows)])
