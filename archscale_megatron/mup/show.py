"""`show`: the hyperparameters of a run, and what each of its parameters starts from and is trained with.

Command lines are read as training reads them. The model is built on the meta device, by the code that trains, and
learning rates and weight decays are those of the groups that Megatron's optimizer makes.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
from collections.abc import Sequence
from typing import Any

from archscale_megatron import single_process

DEFAULTS = {"seq_length": 4096, "micro_batch_size": 2}  # ArchScale's, of what training must be told
REPEATED = re.compile(r"(?<=layers|xperts)\.\d+\.")


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add `show` to the subcommands of a parser; its `run` returns the exit code.

    It takes the options of training too: all that the parser does not know, as `training` of the arguments.
    """
    command = commands.add_parser(
        "show",
        help="the hyperparameters of a run and of each parameter",
        epilog="All other options are those of pretrain_archscale.py; without --seq-length and --micro-batch-size, "
        "sequences have 4096 tokens and a micro batch has 2.",
    )
    command.add_argument("--nodes", type=int, default=1, help="machines, which batches are divided over (1)")
    command.add_argument("--gpus-per-node", type=int, default=8, help="GPUs of each (8)")
    command.add_argument("--json", action="store_true", help="for programs, with every parameter")
    command.set_defaults(run=run, training=[])


def run(options: argparse.Namespace) -> int:
    """Print the run; exits with code 2 and one line on standard error if training would refuse it."""
    single_process.stand_for(options.nodes, options.gpus_per_node, options.training)
    facts = describe(_arguments())
    print(json.dumps(facts, indent=2) if options.json else page(facts))
    return 0


def _arguments() -> argparse.Namespace:
    from megatron.training.arguments import validate_args

    from archscale_megatron.training.arguments import (
        apply_arguments,
        check_schedule,
        exit_on_error,
        parse_command_line,
    )

    args, explicit = parse_command_line()
    for name, value in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    with exit_on_error("mup", args), contextlib.redirect_stdout(io.StringIO()):
        apply_arguments(args, explicit)
        check_schedule(args)
        args.data_parallel_ranks = args.world_size // (
            args.tensor_model_parallel_size * args.pipeline_model_parallel_size
        )
        for name, value in _ONE_PROCESS.items():
            setattr(args, name, value)
        args.global_batch_size = args.global_batch_size or args.micro_batch_size * args.data_parallel_ranks
        args.hybrid_layer_pattern = args.architecture.pattern
        validate_args(args)
    return args


# The model of all ranks in one, without memory.
_ONE_PROCESS: dict[str, Any] = {
    "world_size": 1, "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1,
    "expert_model_parallel_size": 1, "expert_tensor_parallel_size": 1, "sequence_parallel": False,
    "use_cpu_initialization": True, "init_model_with_meta_device": True, "load": None, "save": None,
    "moe_token_dispatcher_type": "allgather", "transformer_impl": "local", "moe_grouped_gemm": False,
}  # fmt: skip


def describe(args: argparse.Namespace) -> dict[str, Any]:
    """All that `show` tells, as JSON can hold it.

    Args:
        args: checked, of one process that has neither process groups nor global arguments.
    """
    arch, run, found = args.architecture, args.parametrization, args.hyperparameters
    parameters = _parameters(args)
    batch = args.global_batch_size * args.seq_length
    of_matrices = {p["learning_rate"] for p in parameters if p["class"] == "matrix"}
    return {
        "family": arch.family,
        "depth": arch.depth,
        "hidden_size": arch.hidden_size,
        "tied_embeddings": arch.tied_embeddings,
        "parametrization": run.name,
        "release": run.release,
        "width_ratio": run.width_ratio,
        "learning_rate": args.lr,
        "matrix_learning_rate": max(of_matrices, default=args.lr),
        "min_learning_rate": args.min_lr,
        "lr_decay_style": args.lr_decay_style,
        "global_batch_tokens": batch,
        "global_batch_size": args.global_batch_size,
        "train_tokens": found.train_tokens if found else _tokens(args, "train", batch),
        "warmup_tokens": found.warmup_tokens if found else _tokens(args, "lr_warmup", batch),
        "weight_decay": args.weight_decay,
        "adam_beta1": args.adam_beta1,
        "adam_beta2": args.adam_beta2,
        "adam_eps": args.adam_eps,
        "clip_grad": args.clip_grad,
        "seed": args.seed,
        "logit_multiplier": arch.logit_multiplier,
        "residual_multiplier": arch.residual_multiplier,
        "router_multiplier": arch.router_multiplier,
        "softmax_scale": arch.softmax_scale or arch.head_dim**-0.5,
        "parameters": parameters,
    }


def _tokens(args: argparse.Namespace, what: str, batch: int) -> int:
    if args.train_iters:
        return getattr(args, f"{what}_iters") * batch
    return getattr(args, f"{what}_samples") * args.seq_length


def _parameters(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What is known of each parameter of the whole model, in the order of the layers."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.optimizer import _get_param_groups
    from megatron.training.arguments import core_transformer_config_from_args
    from megatron.training.training import get_megatron_optimizer_config

    from archscale_megatron.model.config import HybridConfig
    from archscale_megatron.model.spec import build_model
    from archscale_megatron.mup.classes import parameter_class
    from archscale_megatron.mup.initialization import named_global_parameters

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        parallel_state.initialize_model_parallel()
        config = core_transformer_config_from_args(args, HybridConfig)
        config.layer_pattern = args.hybrid_layer_pattern
        with torch.device("meta"), contextlib.redirect_stdout(io.StringIO()):
            model = build_model(
                config,
                padded_vocab_size=args.padded_vocab_size,
                max_sequence_length=args.max_position_embeddings,
                seed=args.seed,
            )
        named = dict(named_global_parameters(model))
        optimizer, overrides = get_megatron_optimizer_config(args)
        groups = _get_param_groups([model], optimizer, overrides)
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()

    group_of = {id(parameter): group for group in groups for parameter in group["params"]}
    found = []
    for name, parameter in named.items():
        group, shape = group_of[id(parameter)], tuple(parameter.shape)
        initial = args.parametrization.initial(name, shape, args.architecture)
        found.append(
            {
                "name": name,
                "shape": list(shape),
                "class": parameter_class(name).value,
                "init": str(initial),
                "init_std": initial.std,
                "learning_rate": group["max_lr"],
                "weight_decay": group["wd_mult"] * args.weight_decay,
            }
        )
    return found


def page(facts: dict[str, Any]) -> str:
    """What `describe` says, to be read: parameters that layers have alike are one line, with their number."""
    tied = "tied" if facts["tied_embeddings"] else "untied"
    lines = [
        f"{facts['family']}, depth {facts['depth']}, hidden size {facts['hidden_size']:,}, {tied} embeddings; "
        f"{facts['parametrization']} of ArchScale {facts['release']}, {facts['width_ratio']:g} of the base width",
        "",
    ]
    rows = [
        ("learning rate", f"{facts['learning_rate']:.4e}"),
        ("  of matrices", f"{facts['matrix_learning_rate']:.4e}"),
        ("  at the end", f"{facts['min_learning_rate']:g} ({facts['lr_decay_style']})"),
        ("batch", f"{facts['global_batch_tokens']:,} tokens, {facts['global_batch_size']:,} sequences"),
        ("training", f"{facts['train_tokens']:,} tokens"),
        ("warm-up", f"{facts['warmup_tokens']:,} tokens"),
        ("weight decay", f"{facts['weight_decay']:g}"),
        ("Adam", f"betas {facts['adam_beta1']:g}, {facts['adam_beta2']:g}, eps {facts['adam_eps']:g}"),
        ("clip, seed", f"{facts['clip_grad']:g}, {facts['seed']}"),
        ("logits x", f"{facts['logit_multiplier']:.4g}"),
        ("residual x", f"{facts['residual_multiplier']:.4g}"),
        ("softmax scale", f"{facts['softmax_scale']:.4g}"),
    ]
    lines += [f"{name:16}{value}" for name, value in rows]
    times: dict[tuple[str, ...], int] = {}
    for parameter in facts["parameters"]:
        row = (
            REPEATED.sub(".*.", parameter["name"]),
            " x ".join(map(str, parameter["shape"])),
            parameter["class"],
            parameter["init"],
            f"{parameter['init_std']:.4g}",
            f"{parameter['learning_rate']:.4e}",
            f"{parameter['weight_decay']:g}",
        )
        times[row] = times.get(row, 0) + 1
    header = ("", "parameter", "shape", "class", "init", "init std", "LR", "WD")
    table = [header, *((f"{n} x" if n > 1 else "", *row) for row, n in times.items())]
    return "\n".join([*lines, "", *_aligned(table)])


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
