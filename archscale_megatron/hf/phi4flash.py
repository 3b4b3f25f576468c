"""Phi4FlashForCausalLM: the names and the config of the public Phi-4-mini-flash-reasoning (its modelling code at
revision 1dff8163d28ec880ca2411c474ddc0a927792810), for models of `phi4miniflash`.

What that code has no place for is folded into the weights: the residual multiplier into the last projection of each
branch, the logit multiplier into the last norm (not into the embedding, which may be the output layer as well), and
what the softmax scale is beyond 1 / sqrt(head_dim) into the queries.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from archscale_megatron.archs.architecture import (
    CROSS_ATTENTION,
    FULL_ATTENTION,
    GMU,
    MAMBA1,
    WINDOW_ATTENTION,
    Architecture,
)
from archscale_megatron.hf.archscale import context_length, linear, mamba1, norm, qkv, query_factor
from archscale_megatron.hf.kinds import Map, Vocabulary, copied, scaled, stacked

NAME = "phi4flash"
FILES = ()
# What the public code takes for granted, or is not seen to read from a config.
FIXED: dict[str, Any] = {
    "hidden_act": "silu", "mb_per_layer": 2, "mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2,
    "mamba_conv_bias": True, "mamba_proj_bias": False, "layer_norm_eps": 1e-5,
}  # fmt: skip
OPTIONS: dict[str, Any] = {
    "differential_attention": True, "qkv_bias": True, "attention_output_bias": True, "linear_bias": False,
    "attention_gate": False, "attention_sink": False, "qk_norm": False, "normalization": "LayerNorm",
    "rotary_base": None, "full_window": None, "top_k": 0,
    "state_size": FIXED["mamba_d_state"], "conv_kernel": FIXED["mamba_d_conv"], "expand": FIXED["mamba_expand"],
    "norm_epsilon": FIXED["layer_norm_eps"],
}  # fmt: skip
"""Fields of Architecture that the public code has no choice of."""
NEEDED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "sliding_window",
)  # fmt: skip


def fits(arch: Architecture) -> bool:
    """Whether the public code computes what `arch` does."""
    return (
        arch.pattern == _pattern(arch.depth)
        and arch.memory_writer == arch.depth  # the mixer of ArchScale's layer depth / 2
        and arch.head_dim * arch.num_attention_heads == arch.hidden_size
        and all(getattr(arch, name) == value for name, value in OPTIONS.items())
    )


def config(arch: Architecture, run: dict[str, Any]) -> dict[str, Any]:
    """config.json, without what does not follow from the architecture and the run.

    The window is one number, which the original configuration class spreads over the layers; `layer_types` says the
    same to later readers.
    """
    return {
        "model_type": "phi4flash",
        "architectures": ["Phi4FlashForCausalLM"],
        "vocab_size": arch.vocab_size,
        "hidden_size": arch.hidden_size,
        "intermediate_size": arch.ffn_hidden_size,
        "num_hidden_layers": arch.depth,
        "num_attention_heads": arch.num_attention_heads,
        "num_key_value_heads": arch.num_query_groups,
        "max_position_embeddings": context_length(run),
        "sliding_window": arch.window,
        "layer_types": [
            "sliding_attention" if symbol == WINDOW_ATTENTION else "full_attention" for symbol in arch.pattern[::2]
        ],
        "mamba_dt_rank": "auto",
        "tie_word_embeddings": arch.tied_embeddings,
        **FIXED,
    }


def architecture(config: dict[str, Any]) -> Architecture:
    """What a Phi4Flash config.json describes.

    Raises:
        ValueError: a field is missing, or it describes what is not trained here.
    """
    if missing := [name for name in NEEDED if name not in config]:
        raise ValueError(f"config.json lacks {', '.join(missing)}")
    depth, hidden_size, heads = config["num_hidden_layers"], config["hidden_size"], config["num_attention_heads"]
    if depth < 4 or depth % 4:
        raise ValueError(f"config.json: num_hidden_layers is {depth}; Phi4Flash has a multiple of 4")
    if hidden_size % heads:
        raise ValueError(f"config.json: hidden_size {hidden_size} is no multiple of num_attention_heads {heads}")
    for name, value in FIXED.items():
        if config.get(name, value) != value:
            raise ValueError(f"config.json: {name} is {config[name]!r}; Phi4Flash is trained here with {value!r}")
    rank = math.ceil(hidden_size / 16)
    if config.get("mamba_dt_rank", "auto") not in ("auto", rank):
        raise ValueError(f"config.json: mamba_dt_rank is {config['mamba_dt_rank']!r}; it is {rank} here, or 'auto'")
    return Architecture(
        family="phi4miniflash",
        depth=depth,
        pattern=_pattern(depth),
        hidden_size=hidden_size,
        ffn_hidden_size=config["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=config["num_key_value_heads"],
        head_dim=hidden_size // heads,
        window=_window(config, depth),
        vocab_size=config["vocab_size"],
        tied_embeddings=config.get("tie_word_embeddings", True),
        **OPTIONS,
    )


def maps(arch: Architecture) -> list[Map]:
    """A map for each parameter, in the order of the model."""
    embedding = ("embedding.word_embeddings.weight",), ("model.embed_tokens.weight",)
    result: list[Map] = [Vocabulary(*embedding, arch.vocab_size, arch.hidden_size)]
    for index, mixer in enumerate(arch.pattern[::2]):
        first, second = f"decoder.layers.{2 * index}", f"decoder.layers.{2 * index + 1}"
        layer = f"model.layers.{index}"
        result += norm(f"{first}.norm", f"{layer}.input_layernorm", arch)
        result += MIXERS[mixer](arch, f"{first}.mixer", f"{layer}.attn")
        result += norm(f"{second}.norm", f"{layer}.post_attention_layernorm", arch)
        result += _mlp(arch, f"{second}.mixer", f"{layer}.mlp")
    result += _scaled(norm("decoder.final_norm", "model.final_layernorm", arch), arch.logit_multiplier)
    if not arch.tied_embeddings:
        result.append(Vocabulary(("output_layer.weight",), ("lm_head.weight",), arch.vocab_size, arch.hidden_size))
    return result


def _pattern(depth: int) -> str:
    if depth < 4 or depth % 4:
        return ""
    return "m-W-" * (depth // 4) + "m-*-" + "U-X-" * (depth // 4 - 1)


def _window(config: dict[str, Any], depth: int) -> int:
    """`sliding_window`: one number, or, as the original configuration class writes it, one for each layer."""
    given = config["sliding_window"]
    pattern = _pattern(depth)[::2]
    if isinstance(given, list):
        windows = {size for size, symbol in zip(given, pattern, strict=False) if symbol == WINDOW_ATTENTION}
        others = {size for size, symbol in zip(given, pattern, strict=False) if symbol != WINDOW_ATTENTION}
        if len(given) != depth or len(windows) != 1 or others != {None}:
            raise ValueError("config.json: sliding_window is not one number for the odd layers of the first half")
        (given,) = windows
    types = config.get("layer_types", [])
    if types and [kind == "sliding_attention" for kind in types] != [s == WINDOW_ATTENTION for s in pattern]:
        raise ValueError("config.json: layer_types has windows in other layers than the odd ones of the first half")
    if not isinstance(given, int) or given < 1:
        raise ValueError(f"config.json: sliding_window is {given!r}; give a positive number of tokens")
    return given


def _scaled(maps: Iterable[Map], factor: float) -> list[Map]:
    return [scaled(one, factor) for one in maps]


def _attention(arch: Architecture, megatron: str, hf: str) -> list[Map]:
    """[Q | K | V] of self-attention."""
    fused = [
        stacked(scaled(one, query_factor(arch), 1.0, 1.0), f"{hf}.Wqkv.{one.megatron[0].rpartition('.')[2]}")
        for one in qkv(megatron, hf, arch)
    ]
    return [*fused, *_heads_and_output(arch, megatron, hf)]


def _cross_attention(arch: Architecture, megatron: str, hf: str) -> list[Map]:
    """Queries alone, under the name of all three."""
    queries = linear(f"{megatron}.linear_q", f"{hf}.Wqkv", arch.query_size, arch.hidden_size, bias=True)
    return [*_scaled(queries, query_factor(arch)), *_heads_and_output(arch, megatron, hf)]


def _heads_and_output(arch: Architecture, megatron: str, hf: str) -> list[Map]:
    core, inner = f"{megatron}.core_attention", f"{hf}.inner_cross_attn"
    lambdas = [
        copied(f"{core}.lambda_{name}", f"{inner}.lambda_{name}", (arch.head_dim,)) for name in ("q1", "k1", "q2", "k2")
    ]
    sub_norm = copied(f"{core}.sub_norm.weight", f"{inner}.subln.weight", (2 * arch.head_dim,))
    output = linear(f"{megatron}.linear_proj", f"{hf}.out_proj", arch.hidden_size, arch.query_size, bias=True)
    return [*lambdas, sub_norm, *_scaled(output, arch.residual_multiplier)]


def _mamba(arch: Architecture, megatron: str, hf: str) -> list[Map]:
    *inner, output = mamba1(arch, megatron, hf)
    return [*inner, scaled(output, arch.residual_multiplier)]


def _gmu(arch: Architecture, megatron: str, hf: str) -> list[Map]:
    memory, hidden_size = arch.memory_size, arch.hidden_size
    output = linear(f"{megatron}.out_proj", f"{hf}.out_proj", hidden_size, memory)
    return [
        *linear(f"{megatron}.in_proj", f"{hf}.in_proj", memory, hidden_size),
        *_scaled(output, arch.residual_multiplier),
    ]


def _mlp(arch: Architecture, megatron: str, hf: str) -> list[Map]:
    """Both sides have the gate's rows above those of the up branch."""
    size, hidden_size = arch.ffn_hidden_size, arch.hidden_size
    output = linear(f"{megatron}.linear_fc2", f"{hf}.fc2", hidden_size, size)
    return [
        *linear(f"{megatron}.linear_fc1", f"{hf}.fc1", 2 * size, hidden_size),
        *_scaled(output, arch.residual_multiplier),
    ]


MIXERS = {
    MAMBA1: _mamba,
    WINDOW_ATTENTION: _attention,
    FULL_ATTENTION: _attention,
    CROSS_ATTENTION: _cross_attention,
    GMU: _gmu,
}
