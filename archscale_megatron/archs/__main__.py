"""Look at architectures without a GPU: `python -m archscale_megatron.archs list | show | plot`."""

from __future__ import annotations

import argparse
import inspect
import json
from pathlib import Path

from archscale_megatron.archs.architecture import Architecture
from archscale_megatron.archs.build import build_architecture
from archscale_megatron.archs.counts import parameters
from archscale_megatron.archs.families import FAMILIES
from archscale_megatron.archs.options import add_overrides, overrides
from archscale_megatron.archs.show import describe, page
from archscale_megatron.command_line import Parser, run, start

DEPTHS = range(1, 33)  # that `list` tries
SIZES = (8, 16, 24, 32)  # whose parameters it prints


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code; exits with 2 and one line on standard error for bad input."""
    parser = _parser()
    return run(parser, parser.parse_args(arguments))


def _parser() -> Parser:
    parser = Parser(prog="python -m archscale_megatron.archs", description="Look at the architectures.")
    commands = parser.add_subparsers(required=True, metavar="list | show | plot")
    commands.add_parser("list", help="the families and their depths").set_defaults(run=_list)
    show = commands.add_parser("show", help="layers, parameters, FLOPs, caches and legal layouts")
    show.add_argument("--json", action="store_true", help="for programs")
    show.set_defaults(run=_show)
    draw = commands.add_parser("plot", help="a drawing of the stack and of its shared state")
    draw.add_argument("-o", "--output", type=Path, required=True, help="a .png, .svg or .pdf file")
    draw.set_defaults(run=_plot)
    for command in (show, draw):
        command.add_argument("family", help="a name that `list` prints")
        command.add_argument("--depth", type=int, required=True, help="layers, each a mixer and an MLP")
        command.add_argument("--seq-length", type=int, default=4096, help="tokens of a training sequence (4096)")
        command.add_argument("--vocab-size", type=int, help="rows of the embedding (the family's)")
        command.add_argument("--hidden-size", type=int, help="width of the residual stream (the aspect ratio's)")
        command.add_argument("--ffn-hidden-size", type=int, help="width of the MLPs (four times the hidden size)")
        command.add_argument("--rotary-base", type=int, help="RoPE's base (10000)")
        command.add_argument("--untie-embeddings-and-output-weights", action="store_true")
        add_overrides(command)
    return parser


def _architecture(args: argparse.Namespace) -> Architecture:
    if args.seq_length < 1:
        raise ValueError(f"--seq-length {args.seq_length}: must be a positive integer")
    return build_architecture(
        args.family,
        args.depth,
        context_length=args.seq_length,
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        rotary_base=args.rotary_base,
        tied_embeddings=not args.untie_embeddings_and_output_weights,
        **overrides(args),
    )


def _list(args: argparse.Namespace) -> None:
    print(f"{'':24}{'parameters (billions) at depth':32}depths up to {DEPTHS[-1]}")
    print(f"{'family':24}{''.join(f'{depth:6}' for depth in SIZES)}")
    for name, family in FAMILIES.items():
        models = _models(name)
        sizes = (f"{parameters(models[depth]) / 1e9:6.2f}" if depth in models else f"{'-':>6}" for depth in SIZES)
        print(f"{name:24}{''.join(sizes):32}{_in_words(list(models))}")
        print(f"{'':4}{inspect.getdoc(family).splitlines()[0].replace('`', '')}")  # type: ignore[union-attr]


def _models(family: str) -> dict[int, Architecture]:
    """Depth -> architecture, of the depths that `family` can have."""
    models = {}
    for depth in DEPTHS:
        try:
            models[depth] = build_architecture(family, depth)
        except ValueError:
            continue
    return models


def _in_words(depths: list[int]) -> str:
    """[4, 8, ..., 32] -> "multiples of 4", [1, 2, 3, 8] -> "1, 2, 3, 8"."""
    if depths == list(DEPTHS):
        return "all"
    if depths == [depth for depth in DEPTHS if depth % depths[0] == 0]:
        return f"multiples of {depths[0]}"
    return ", ".join(map(str, depths))


def _show(args: argparse.Namespace) -> None:
    arch = _architecture(args)
    print(json.dumps(describe(arch, args.seq_length), indent=2) if args.json else page(arch, args.seq_length))


def _plot(args: argparse.Namespace) -> None:
    from archscale_megatron.archs.plot import plot  # matplotlib takes longer to import than all else here

    plot(_architecture(args), args.output)


if __name__ == "__main__":
    start(main)
