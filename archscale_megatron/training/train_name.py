"""ArchScale's run names: each word of `--train-name` stands for options.

ArchScale looks for substrings of a run's name wherever a feature may be switched. Here a name is split at `_` and
expanded once, into the options that its words stand for.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Collection
from typing import Any

# Word -> the arguments that it sets. "varlen" leaves the sequence length alone: that is --seq-length.
WORDS: dict[str, dict[str, Any]] = {
    "scaling": {},  # names the experiment
    "prolong": {},  # names the data
    "tie": {"untie_embeddings_and_output_weights": False},
    "rbase": {"rotary_base": 640000},
    "nope": {"position_embedding_type": "none"},
    "varlen": {"reset_at_eod": True},
    "ls": {"label_smoothing": 0.1},
    "bias": {"add_qkv_bias": True, "attention_output_bias": True},
    "qknorm": {"qk_layernorm": True},
    "ga": {"attention_gate": True},
    "sgate": {"sqrt_gate": True},
    "shexp": {"shared_expert": True},
    "mup": {"parametrization_name": "mup++"},
    "ori_mup": {"parametrization_name": "mup"},
    "muon": {"optimizer": "muon"},
    "muonh": {"optimizer": "muonh", "parametrization_name": "hyperp"},  # whatever "mup" says
    "cosine": {"lr_decay_style": "cosine"},
    "wsd": {"lr_decay_style": "WSD"},
    "midtrain": {"archscale_release": "2026-03", "base_hps_warmup_tokens0": 0},
    "v2scale": {"archscale_release": "2026-03", "independent_weight_decay": True, "count_embeddings": True},
}
# As in ArchScale, and unlike here without a name.
WITHOUT_WORDS = {"untie_embeddings_and_output_weights": True, "parametrization_name": "sp"}


def expand(name: str, arguments: Collection[str]) -> dict[str, Any]:
    """Argument -> value, of all that `name` says.

    Args:
        name: words joined by `_`, in any order: `scaling_tie_rbase_varlen`.
        arguments: those that there are; a word that needs another is unknown.
    Raises:
        ValueError: an unknown word; lists the known ones.
    """
    known = {word: options for word, options in WORDS.items() if options.keys() <= set(arguments)}
    words = re.split("(?<!ori)_|_(?!mup(?:_|$))", name)  # ori_mup is one word
    unknown = [word for word in words if word not in known]
    if unknown:
        raise ValueError(
            f"--train-name {name}: unknown word {', '.join(map(repr, unknown))}; known are {', '.join(sorted(known))}"
        )
    expanded = dict(WITHOUT_WORDS)
    for word, options in known.items():
        expanded |= options if word in words else {}
    return expanded


def apply_train_name(args: argparse.Namespace, explicit: dict[str, str]) -> dict[str, Any]:
    """Set what `args.train_name`, if any, says, and print it; returns it as `expand` does.

    Args:
        explicit: attribute -> option, of what stands on the command line.
    Raises:
        ValueError: an unknown word, or an option that says otherwise.
    """
    if args.train_name is None:
        return {}
    expanded = expand(args.train_name, vars(args))
    for name, value in expanded.items():
        if name in explicit and getattr(args, name) != value:
            raise ValueError(
                f"{explicit[name]} {getattr(args, name)} contradicts --train-name {args.train_name}, "
                f"by which {name} is {value}; change one of the two"
            )
        setattr(args, name, value)
    if args.rank == 0:
        print(f"--train-name {args.train_name}: {', '.join(f'{name} = {value}' for name, value in expanded.items())}")
    return expanded
