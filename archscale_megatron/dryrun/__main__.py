"""A training step on any number of GPUs, without one: what every pipeline stage holds in memory and sends.

Each stage is built in a process of its own by the code that trains (Megatron's model, DDP, optimizer and pipeline
schedule), over process groups of torch's `fake` backend and tensors without data. Tensor- and data-parallel ranks of a
stage have tensors of the same shapes, so that one of them stands for all.

Memory is that of tensors. Not counted: what the CUDA context, NCCL and the workspaces of kernels take (one to a few
GiB), fragments, and what the optimizer's step allocates for its duration. Linear layers, norms and activations are
those of --transformer-impl local.

Experts get equally many tokens each, and with --reset-at-eod each sequence is one document.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from archscale_megatron import single_process
from archscale_megatron.archs.architecture import MAMBA1


def parser() -> argparse.ArgumentParser:
    """The dry run's own options."""
    result = argparse.ArgumentParser(
        prog="python -m archscale_megatron.dryrun",
        description=__doc__,
        epilog="All other options are those of pretrain_archscale.py; what concerns data and files is ignored.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    result.add_argument("--nodes", type=int, default=1, help="machines (1)")
    result.add_argument("--gpus-per-node", type=int, default=8, help="GPUs of each (8)")
    result.add_argument(
        "--kernels",
        choices=("fused", "torch"),
        default="fused",
        help="whose memory is counted in attention, convolution, Mamba-1's scan, norms, gates and the loss: "
        "flash-attn, causal-conv1d and our Triton kernels (fused, the default), or the torch code that runs on a CPU. "
        "Mamba-2 and gated delta nets are torch code in both",
    )
    result.add_argument("--json", metavar="FILE", help="write the result there too; - writes it instead of the table")
    return result


def main() -> None:
    options, training = parser().parse_known_args()
    if options.json not in (None, "-") and not Path(options.json).parent.is_dir():
        parser().error(f"--json {options.json}: there is no directory {Path(options.json).parent}")
    try:
        single_process.stand_for(options.nodes, options.gpus_per_node, training)
    except ValueError as error:
        parser().error(str(error))

    from archscale_megatron.dryrun.report import summary, table

    args = _arguments(options.kernels)
    found = summary(args, _run_stages(args, options.kernels), options.kernels)
    if options.json != "-":
        print(table(found))
    if options.json:
        text = json.dumps(found, indent=2) + "\n"
        sys.stdout.write(text) if options.json == "-" else Path(options.json).write_text(text)


def _arguments(kernels: str) -> argparse.Namespace:
    from megatron.training.arguments import validate_args
    from megatron.training.global_vars import set_global_variables

    from archscale_megatron.training.arguments import (
        apply_arguments,
        check_schedule,
        exit_on_error,
        parse_command_line,
    )

    args, explicit = parse_command_line()
    # What training must be told, and nothing here depends on.
    args.lr = args.lr or 1.0
    if args.train_iters is None and args.train_samples is None:
        args.train_iters = 10**6
    with exit_on_error("dryrun", args), contextlib.redirect_stdout(io.StringIO()):
        _check_countable(args, explicit, kernels)
        apply_arguments(args, explicit)
        if MAMBA1 in args.architecture.pattern and kernels == "fused" and find_spec("triton") is None:
            raise ValueError("Mamba-1's fused scan needs triton; install it, or give --kernels torch")
        if args.reset_at_eod and args.architecture.attention_sink and kernels == "torch":
            raise ValueError("--reset-at-eod: documents with an attention sink are counted with --kernels fused alone")
        check_schedule(args)
        for name, value in _WITHOUT_SIDE_EFFECTS.items():
            setattr(args, name, value)
        validate_args(args)
        set_global_variables(args, build_tokenizer=False)
    return args


# What allocates where nobody here sees it, or routes tokens otherwise.
_NOT_COUNTED = {
    "transformer_impl": "the dry run counts --transformer-impl local",
    "fp8": "the dry run counts bf16, fp16 and fp32",
    "fp4": "the dry run counts bf16, fp16 and fp32",
    "moe_permute_fusion": "the dry run counts --transformer-impl local",
    "moe_expert_capacity_factor": "the dry run's experts get equally many tokens and drop none",
}


def _check_countable(args: argparse.Namespace, explicit: dict[str, str], kernels: str) -> None:
    for name, reason in _NOT_COUNTED.items():
        if name in explicit and getattr(args, name) != "local":
            value = "" if getattr(args, name) is True else f" {getattr(args, name)}"
            raise ValueError(f"{explicit[name]}{value}: {reason}; leave it out")
    if args.moe_token_dispatcher_type == "flex":
        raise ValueError(
            "--moe-token-dispatcher-type flex: the dry run counts alltoall and allgather; use one of these"
        )


# No files, servers or handlers of signals; no checks of values; the fake backend.
_WITHOUT_SIDE_EFFECTS: dict[str, Any] = {
    "load": None, "save": None, "pretrained_checkpoint": None, "async_save": False, "tensorboard_dir": None,
    "wandb_project": "", "log_energy": False, "exit_signal_handler": False, "check_for_nan_in_loss_and_grad": False,
    "check_for_spiky_loss": False, "fake_process_group": True, "use_gloo_process_groups": False,
}  # fmt: skip


def _run_stages(args: argparse.Namespace, kernels: str) -> list[Any]:
    """All stages, as many at a time as there are processors; a bar on standard error if somebody sees it."""
    from tqdm import tqdm

    from archscale_megatron.dryrun import stage  # noqa: F401  # once, before the processes

    stages = range(args.pipeline_model_parallel_size)
    context = multiprocessing.get_context("fork")
    with context.Pool(min(len(stages), os.cpu_count() or 1), maxtasksperchild=1) as pool:
        results = pool.imap(_run_stage, [(args, index, kernels) for index in stages], chunksize=1)
        return list(tqdm(results, total=len(stages), desc="stages", leave=False, disable=None))


def _run_stage(task: tuple[argparse.Namespace, int, str]) -> Any:
    from megatron.training import get_args

    from archscale_megatron.dryrun.stage import run_stage

    _, index, kernels = task
    with contextlib.redirect_stdout(io.StringIO()):
        return run_stage(get_args(), index, kernels)


if __name__ == "__main__":
    main()
