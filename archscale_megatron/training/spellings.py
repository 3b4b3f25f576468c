"""ArchScale's options and how it spells them: what they are called here, and its numbers."""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Any

from archscale_megatron.checkpoint.resume import candidates, is_checkpoint
from archscale_megatron.mup.rules import NAMES, RELEASES
from archscale_megatron.mup.transfer import BASES, BaseHyperparameters, option

# ArchScale's name of an option that has another here.
ALIASES = {
    "ctx_len": "seq_length", "swa_len": "local_window", "ar": "aspect_ratio", "micro_bsz": "micro_batch_size",
}  # fmt: skip
# Names of March 2026 of what July 2025 called otherwise.
MARCH_NAMES = {
    "weight_decay0": "weight_decay", "eps0": "eps", "warmup_tokens0": "warmup_tokens", "beta1_0": "beta1",
    "beta2_0": "beta2", "muon_beta_0": "muon_beta", "w_init0": "w_init_scale",
}  # fmt: skip
FIELDS = {field.name: field.type for field in dataclasses.fields(BaseHyperparameters)}
DESTS = {field: f"base_hps_{field}" for field in FIELDS}
COUNTS = {"max_tokens", "total_bsz", *(DESTS[field] for field, kind in FIELDS.items() if kind == "int")}
NUMBERS = COUNTS | set(DESTS.values())


def add_hyperparameters(group: argparse._ArgumentGroup) -> None:
    """Add the options to a group of Megatron's parser."""
    group.add_argument(
        "--parametrization",
        dest="parametrization_name",
        choices=NAMES,
        help="how hyperparameters scale (sp, or --train-name's)",
    )
    group.add_argument(
        "--archscale-release", choices=RELEASES, help="whose rules and base values (2025-07; of hyperp 2026-03)"
    )
    for field in FIELDS:
        names = [option(field), *([option(MARCH_NAMES[field])] if field in MARCH_NAMES else [])]
        value = getattr(BASES["2025-07"], field)
        march = getattr(BASES["2026-03"], field)
        default = f"{value:g}" if march == value else f"{value:g}; in 2026-03 {march:g}"
        group.add_argument(*names, dest=DESTS[field], metavar="X", help=f"base value ({default})")
    group.add_argument("--max-tokens", metavar="N", help="to train on, such as 5e12 (by the laws)")
    group.add_argument("--total-bsz", metavar="N", help="tokens of a batch, rounded to whole micro batches (b0)")
    group.add_argument(
        "--independent-weight-decay", action="store_true", help="weight decay does not depend on the learning rate"
    )
    group.add_argument("--count-embeddings", action="store_true", help="in the parameters that training tokens follow")
    group.add_argument("--resume", metavar="auto|PATH", help="go on from checkpoints; auto: of --save, if it has some")
    for name, ours in ALIASES.items():
        group.add_argument(
            f"--{name.replace('_', '-')}", dest=name, type=int, metavar="N", help=f"--{ours.replace('_', '-')}"
        )


def add_underscored(group: argparse._ArgumentGroup) -> None:
    """Accept all options of `group` with underscores too, as ArchScale spells them."""
    for action in group._group_actions:
        for name in action.option_strings:
            group._option_string_actions["--" + name[2:].replace("-", "_")] = action


def read_spellings(args: argparse.Namespace, explicit: dict[str, str]) -> None:
    """Make numbers of ArchScale's spellings, and set what its names of options stand for.

    Raises:
        ValueError: not a number, or both names of an option are given and differ.
    """
    for name in NUMBERS & explicit.keys():
        setattr(args, name, (whole if name in COUNTS else number)(explicit[name], getattr(args, name)))
    for name, ours in ALIASES.items():
        if name not in explicit:
            continue
        value = getattr(args, name)
        if ours in explicit and getattr(args, ours) != value:
            raise ValueError(
                f"{explicit[name]} {value} and {explicit[ours]} {getattr(args, ours)} say the same; give one of them"
            )
        setattr(args, ours, value)


def apply_resume(args: argparse.Namespace) -> None:
    """Set Megatron's `load` to what `--resume` says.

    Raises:
        ValueError: `auto` without `--save`, a directory without checkpoints, or `--load` says otherwise.
    """
    if args.resume is None:
        return
    if args.resume == "auto" and not args.save:
        raise ValueError("--resume auto: goes on from --save; give that")
    directory = args.save if args.resume == "auto" else args.resume
    if args.load not in (None, directory):
        raise ValueError(f"--resume {args.resume} and --load {args.load} say the same; give one of them")
    path = Path(directory)
    if is_checkpoint(path) or (path.is_dir() and candidates(path)):
        args.load = directory
    elif args.resume != "auto":
        raise ValueError(f"--resume {directory}: there is no checkpoint; give another directory, or auto")


def number(name: str, text: Any) -> float:
    """`text`, as in 4e-4 or 1_000; raises ValueError with the option's name if it is none."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{name} {text}: not a number")
    return value


def whole(name: str, text: Any) -> int:
    """`text` as a positive count or 0, as in 5e12 or 25_165_824_000; raises ValueError if it is none."""
    value = number(name, text)
    if value < 0 or not value.is_integer():
        raise ValueError(f"{name} {text}: must be a whole number")
    return int(value)
