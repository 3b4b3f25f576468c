"""`scaling plan`: tokens, steps, FLOPs, GPU-hours, days and cost of a run that has not been made."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass, replace

from archscale_megatron.archs.architecture import Architecture
from archscale_megatron.archs.build import build_architecture
from archscale_megatron.archs.counts import parameters, training_flops
from archscale_megatron.mup.transfer import BASES, target_tokens

TOKENS_PER_PARAMETER = 20.0
"""arXiv 2203.15556; here of all parameters, the embedding's included."""


@dataclass(frozen=True)
class Plan:
    """What a run takes.

    Attributes:
        parameters: all of the model's.
        flops_per_token: of training; counted layer by layer for a family, else 6 a parameter.
        rule: where the tokens come from.
        flops: of the whole run, without recomputation.
        mfu: what part of `peak_tflops` a GPU does of these FLOPs.
        gpu_hours, days: of all GPUs together, and of the clock.
        cost: GPU-hours times `price`, in its currency; None without a price.
    """

    model: str
    parameters: float
    flops_per_token: float
    rule: str
    tokens: int
    tokens_per_parameter: float
    batch_tokens: int
    steps: int
    flops: float
    gpus: int
    peak_tflops: float
    mfu: float
    gpu_hours: float
    days: float
    price: float | None
    cost: float | None


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add the parser of `plan`, which sets `run`, a function of the parsed arguments."""
    command = commands.add_parser(
        "plan",
        help="tokens, steps, FLOPs, days and cost of a run",
        description="What a run takes: of a family at a depth, of a number of parameters, or the best of a budget.",
        allow_abbrev=False,
    )
    model = command.add_argument_group("model")
    model.add_argument("--train-model", metavar="FAMILY", help="with --depth: FLOPs are counted layer by layer")
    model.add_argument("--depth", type=int, help="layers, each a mixer and an MLP")
    model.add_argument("--parameters", type=float, help="in their place: 6 FLOPs a parameter and token")
    model.add_argument("--seq-length", type=int, default=4096, help="tokens of a sequence (4096)")
    model.add_argument("--vocab-size", type=int, help="rows of the embedding (the family's)")
    model.add_argument("--untie-embeddings-and-output-weights", action="store_true")
    tokens = command.add_argument_group("tokens").add_mutually_exclusive_group()
    tokens.add_argument("--rule", choices=("chinchilla", "archscale"), help="where the tokens come from (chinchilla)")
    tokens.add_argument("--max-tokens", type=float, metavar="TOKENS", help="train on so many")
    tokens.add_argument(
        "--flops", type=float, help="spend this budget; without a model, on the one that Chinchilla's rule gives"
    )
    rule = command.add_argument_group("rules")
    rule.add_argument(
        "--tokens-per-parameter", type=float, default=TOKENS_PER_PARAMETER, metavar="N", help="Chinchilla's (20)"
    )
    rule.add_argument(
        "--archscale-release", choices=("2025-07", "2026-03"), default="2025-07", help="whose law and base (2025-07)"
    )
    rule.add_argument("--base-hps.t0", dest="t0", type=float, help="tokens of ArchScale's base model (the release's)")
    rule.add_argument("--base-hps.d0", dest="d0", type=int, help="its depth (the release's)")
    machine = command.add_argument_group("machine")
    machine.add_argument("--batch-tokens", type=float, default=2**21, metavar="N", help="tokens of a step (2097152)")
    machine.add_argument("--gpus", type=int, default=8, help="(8)")
    machine.add_argument("--peak-tflops", type=float, default=989.0, help="of a GPU (989: H100 SXM, bf16)")
    machine.add_argument("--mfu", type=float, default=0.4, help="model FLOPs utilisation, from 0 to 1 (0.4)")
    machine.add_argument("--price", type=float, help="of a GPU-hour")
    command.add_argument("--json", action="store_true", help="for programs")
    command.set_defaults(run=_run)


def plan(args: argparse.Namespace) -> Plan:
    """The plan of parsed arguments.

    Raises:
        ValueError: a number out of range, no model and no budget, or a family without a law; says what to give.
    """
    _check(args)
    arch = _architecture(args)
    if arch:
        name, size = f"{arch.family} d{arch.depth}", float(parameters(arch))
        per_token = training_flops(arch, args.seq_length)
    else:
        # F = 6 N D and D = r N.
        size = args.parameters or math.sqrt(args.flops / (6 * args.tokens_per_parameter))
        name, per_token = f"{size / 1e9:.4g} billion parameters", 6 * size
    if args.flops:
        rule, tokens = f"budget of {args.flops:.4g} FLOPs", round(args.flops / per_token)
    elif args.max_tokens:
        rule, tokens = "given", int(args.max_tokens)
    elif args.rule == "archscale":
        if arch is None:
            raise ValueError("--rule archscale: is of a family; give --train-model and --depth")
        rule, tokens = "archscale: t0 N(d)/N(d0)", _archscale_tokens(args, arch)
    else:
        rule = f"chinchilla: {args.tokens_per_parameter:g} a parameter"
        tokens = round(args.tokens_per_parameter * size)
    steps, flops = int(tokens // args.batch_tokens), tokens * per_token
    if not steps:
        raise ValueError(f"{tokens:,} tokens are less than one batch; give a smaller --batch-tokens")
    gpu_hours = flops / (args.peak_tflops * 1e12 * args.mfu) / 3600
    return Plan(
        model=name,
        parameters=size,
        flops_per_token=per_token,
        rule=rule,
        tokens=tokens,
        tokens_per_parameter=tokens / size,
        batch_tokens=int(args.batch_tokens),
        steps=steps,
        flops=flops,
        gpus=args.gpus,
        peak_tflops=args.peak_tflops,
        mfu=args.mfu,
        gpu_hours=gpu_hours,
        days=gpu_hours / args.gpus / 24,
        price=args.price,
        cost=None if args.price is None else gpu_hours * args.price,
    )


def _archscale_tokens(args: argparse.Namespace, arch: Architecture) -> int:
    given = {name: int(value) for name in ("t0", "d0") if (value := getattr(args, name)) is not None}
    return target_tokens(replace(BASES[args.archscale_release], **given), arch, args.archscale_release)


def table(found: Plan) -> str:
    """The plan in lines of a name and a value."""
    lines = {
        "model": found.model,
        "parameters": f"{found.parameters:,.0f}",
        "FLOPs a token": f"{found.flops_per_token:.4g}",
        "tokens": f"{found.tokens:,}  ({found.rule}; {found.tokens_per_parameter:.1f} a parameter)",
        "steps": f"{found.steps:,}  of {found.batch_tokens:,} tokens",
        "FLOPs": f"{found.flops:.4g}",
        "GPU-hours": f"{found.gpu_hours:,.1f}  at {found.mfu:.0%} of {found.peak_tflops:g} TFLOP/s",
        "days": f"{found.days:,.2f}  on {found.gpus:,} GPUs",
    }
    if found.cost is not None:
        lines["cost"] = f"{found.cost:,.2f}  at {found.price:g} a GPU-hour"
    return "\n".join(f"{name:14} {value}" for name, value in lines.items())


def _run(args: argparse.Namespace) -> None:
    found = plan(args)
    print(json.dumps(asdict(found), indent=2) if args.json else table(found))


def _architecture(args: argparse.Namespace) -> Architecture | None:
    if args.train_model and args.depth is not None and not args.parameters:
        return build_architecture(
            args.train_model,
            args.depth,
            context_length=args.seq_length,
            vocab_size=args.vocab_size,
            tied_embeddings=not args.untie_embeddings_and_output_weights,
        )
    if args.train_model or args.depth is not None:
        raise ValueError("--train-model and --depth: give both, and no --parameters")
    if not args.parameters and not args.flops:
        raise ValueError("give a model (--train-model and --depth, or --parameters) or a budget (--flops)")
    return None


def _check(args: argparse.Namespace) -> None:
    for name in ("tokens_per_parameter", "batch_tokens", "gpus", "peak_tflops", "seq_length"):
        _positive(name, getattr(args, name))
    for name in ("parameters", "max_tokens", "flops", "price", "t0", "d0"):
        if (value := getattr(args, name)) is not None:
            _positive(name, value)
    if not 0 < args.mfu <= 1:
        raise ValueError(f"--mfu {args.mfu:g}: must be more than 0, and 1 at most")


def _positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        option = f"base-hps.{name}" if name in ("t0", "d0") else name.replace("_", "-")
        raise ValueError(f"--{option} {value:g}: must be a positive number")
