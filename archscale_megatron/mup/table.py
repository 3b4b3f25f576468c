"""`table`: what the transfer laws make of a family at several depths, as Table 7 of arXiv 2507.06607."""

from __future__ import annotations

import argparse
import math

from archscale_megatron.archs.build import build_architecture
from archscale_megatron.mup.rules import RELEASES, Parametrization
from archscale_megatron.mup.transfer import BASES, target_tokens, transfer

DEPTHS = (8, 12, 16, 20, 24)
COLUMNS = ("depth", "vector LR", "matrix LR", "logits x", "residual x", "tokens", "steps")


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add `table` to the subcommands of a parser; its `run` returns the exit code."""
    command = commands.add_parser("table", help="the hyperparameters of a family by depth, under μP++")
    command.add_argument("family", help="architecture family")
    command.add_argument("--depths", type=int, nargs="+", default=DEPTHS, metavar="N", help="(8 12 16 20 24)")
    command.add_argument("--archscale-release", choices=RELEASES, default="2025-07", help="(2025-07)")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the table, of ArchScale's base values; ValueError if there is no such family, depth or law."""
    print("".join(f"{column:>12}" for column in COLUMNS))
    base = BASES[args.archscale_release]
    for depth in args.depths:
        arch = build_architecture(args.family, depth)
        run = Parametrization("mup++", depth / base.d0, release=args.archscale_release)
        tokens = target_tokens(base, arch, args.archscale_release)
        found = transfer(base, run, arch, batch_tokens=base.b0, train_tokens=tokens)
        row = (
            f"{depth}", f"{found.learning_rate:.4e}", f"{found.matrix_learning_rate:.4e}", f"{1 / run.width_ratio:.4f}",
            f"{1 / math.sqrt(2 * depth):.4f}", f"{tokens / 1e9:.2f}B", f"{tokens // base.b0:,}",
        )  # fmt: skip
        print("".join(f"{cell:>12}" for cell in row))
    return 0
