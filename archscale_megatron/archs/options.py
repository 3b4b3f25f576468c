"""The command-line options that override a family's numbers, the same for training and for the tools."""

from __future__ import annotations

import argparse
from typing import Any

NUMBERS = {
    "aspect_ratio": "hidden size / depth",
    "head_dim": "size of an attention head (128)",
    "num_heads": "attention heads (the depth)",
    "num_kv_heads": "key-value heads (a quarter of the heads)",
    "local_window": "tokens that sliding-window attention sees",
    "sparsity": "experts / experts of a token (8)",
    "top_k": "experts of a token, each 1 / top-k of an MLP (8)",
}
# Fields of `Options`.
SWITCHES = {
    "differential_attention": "differences of pairs of attention maps",
    "attention_gate": "gate each attention head",
    "attention_sink": "a learned logit a head that takes attention from the tokens",
    "attention_output_bias": "bias of the attention's output projection",
    "linear_bias": "biases of the projections of MLPs and GMUs",
    "shared_expert": "one of a token's experts is the same for all tokens",
    "sqrt_gate": "weigh experts with the roots of their probabilities",
}


def add_overrides(parser: argparse._ActionsContainer) -> None:
    """Add the options to a parser or to a group of one."""
    for name, meaning in NUMBERS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=meaning)
    for name, meaning in SWITCHES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", action="store_true", default=None, help=meaning)


def overrides(args: argparse.Namespace) -> dict[str, Any]:
    """What of `args` are keyword arguments of `build_architecture`; None where the family decides."""
    return {name: getattr(args, name) for name in (*NUMBERS, *SWITCHES)}
