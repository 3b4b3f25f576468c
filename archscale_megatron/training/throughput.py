"""What is logged of the speed: tokens, and floating-point operations that know windows and scans."""

from __future__ import annotations

import argparse
from typing import Any

from megatron.training import get_args, get_tensorboard_writer, get_timers, get_wandb_writer
from megatron.training.utils import print_rank_last

from archscale_megatron.archs.counts import training_flops

_samples_at_last_log: int | None = None


def model_flops(args: argparse.Namespace, batch_size: int, *_: Any, **__: Any) -> float:
    """FLOPs of one training iteration of `batch_size` samples; in the place of Megatron's count, which knows
    neither Mamba-1 nor windows."""
    return training_flops(args.architecture, args.seq_length) * batch_size * args.seq_length


def log_tokens_per_second(iteration: int, is_first_iteration: bool) -> None:
    """Log tokens per second and model FLOP/s per GPU since the last call, where Megatron logs its own line.

    Must run before Megatron's `training_log`, which resets the timer.
    """
    global _samples_at_last_log
    args = get_args()
    if _samples_at_last_log is None:  # the first iteration of this run is over
        _samples_at_last_log = args.consumed_train_samples - args.global_batch_size
    if iteration % args.log_interval:
        return
    seconds = get_timers()("interval-time").elapsed(reset=False, barrier=True)
    samples = args.consumed_train_samples - _samples_at_last_log
    if not is_first_iteration:  # after which Megatron does not reset its timer either
        _samples_at_last_log = args.consumed_train_samples
    tokens = samples * args.seq_length / seconds
    flops = model_flops(args, samples) / seconds / args.world_size
    print_rank_last(
        f" iteration {iteration:8d} | tokens per second: {tokens:,.0f} | model GFLOP/s per device: {flops / 1e9:,.1f}"
    )
    scalars = {"tokens-per-second": tokens, "model-flops-per-second-per-device": flops}
    if writer := get_tensorboard_writer():
        for name, value in scalars.items():
            writer.add_scalar(name, value, iteration)
    if wandb := get_wandb_writer():
        wandb.log(scalars, iteration)
