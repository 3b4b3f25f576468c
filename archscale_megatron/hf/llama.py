"""LlamaForCausalLM: models that are plain Llama, for any program that knows it.

What Llama has no place for is folded into the weights: the residual multiplier into the last projection of each branch,
the logit multiplier into the last norm (not into an embedding, which may be the output layer as well), and what the
softmax scale is beyond 1 / sqrt(head_dim) into the queries.
"""

from __future__ import annotations

from typing import Any

from archscale_megatron.archs.architecture import FULL_ATTENTION, MLP, Architecture
from archscale_megatron.hf.archscale import context_length, gate_up, linear, norm, qkv, query_factor
from archscale_megatron.hf.kinds import Map, Vocabulary, scaled

NAME = "llama"
FILES = ()


def fits(arch: Architecture) -> bool:
    """Whether Llama computes what `arch` does: full attention with RoPE, SwiGLU, RMSNorm, and biases of all four
    projections of attention or of none."""
    return (
        arch.pattern == (FULL_ATTENTION + MLP) * arch.depth
        and arch.full_window is None
        and arch.rotary_base is not None
        and arch.normalization == "RMSNorm"
        and arch.qkv_bias == arch.attention_output_bias
        and not (arch.attention_sink or arch.attention_gate or arch.qk_norm or arch.differential_attention)
    )


def config(arch: Architecture, run: dict[str, Any]) -> dict[str, Any]:
    """config.json, without what does not follow from the architecture and the run."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": arch.vocab_size,
        "hidden_size": arch.hidden_size,
        "intermediate_size": arch.ffn_hidden_size,
        "num_hidden_layers": arch.depth,
        "num_attention_heads": arch.num_attention_heads,
        "num_key_value_heads": arch.num_query_groups,
        "head_dim": arch.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": context_length(run),
        "rms_norm_eps": arch.norm_epsilon,
        "rope_theta": float(arch.rotary_base or 0),
        "rope_scaling": None,
        "attention_bias": arch.qkv_bias,
        "mlp_bias": arch.linear_bias,
        "tie_word_embeddings": arch.tied_embeddings,
    }


def architecture(config: dict[str, Any]) -> Architecture:
    """What a Llama config.json describes.

    Raises:
        ValueError: a field is missing, or it describes what is not trained here.
    """
    fixed = {"hidden_act": "silu", "rope_scaling": None, "pretraining_tp": 1}
    for name, value in fixed.items():
        if config.get(name, value) != value:
            raise ValueError(f"config.json: {name} is {config[name]!r}; Llama models are trained here with {value!r}")
    needed = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps",
    )  # fmt: skip
    if missing := [name for name in needed if name not in config]:
        raise ValueError(f"config.json lacks {', '.join(missing)}")
    heads, depth, base = config["num_attention_heads"], config["num_hidden_layers"], _rope_base(config)
    if base != int(base):
        raise ValueError(f"config.json: rope_theta is {base}; a base is a whole number here")
    return Architecture(
        family="transformer",
        depth=depth,
        pattern=(FULL_ATTENTION + MLP) * depth,
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        window=128,  # of no layer: what the family has
        rotary_base=int(base),
        vocab_size=config["vocab_size"],
        tied_embeddings=config.get("tie_word_embeddings", False),
        norm_epsilon=config["rms_norm_eps"],
        qkv_bias=config.get("attention_bias", False),
        attention_output_bias=config.get("attention_bias", False),
        linear_bias=config.get("mlp_bias", False),
    )


def _rope_base(config: dict[str, Any]) -> float:
    """Where transformers 4 has it, or 5; raises ValueError for angles that are not plain RoPE's."""
    rope = config.get("rope_parameters") or {}
    plain = isinstance(rope, dict) and rope.get("rope_type", "default") == "default"
    if not plain or rope.keys() - {"rope_type", "rope_theta"}:
        raise ValueError(f"config.json: rope_parameters is {rope!r}; Llama models are trained here with plain RoPE")
    return rope.get("rope_theta", config.get("rope_theta", 10000.0))


def maps(arch: Architecture) -> list[Map]:
    """A map for each parameter, in the order of the model."""
    hidden_size, residual = arch.hidden_size, arch.residual_multiplier
    query = query_factor(arch)
    all_maps: list[Map] = [
        Vocabulary(("embedding.word_embeddings.weight",), ("model.embed_tokens.weight",), arch.vocab_size, hidden_size)
    ]
    for index in range(arch.depth):
        attention, mlp = (f"decoder.layers.{2 * index + i}" for i in (0, 1))
        hf = f"model.layers.{index}"
        all_maps += norm(f"{attention}.norm", f"{hf}.input_layernorm", arch)
        all_maps += [scaled(one, query, 1.0, 1.0) for one in qkv(f"{attention}.mixer", f"{hf}.self_attn", arch)]
        output = linear(
            f"{attention}.mixer.linear_proj",
            f"{hf}.self_attn.o_proj",
            hidden_size,
            arch.query_size,
            arch.attention_output_bias,
        )
        all_maps += [scaled(one, residual) for one in output]
        all_maps += norm(f"{mlp}.norm", f"{hf}.post_attention_layernorm", arch)
        all_maps += gate_up(f"{mlp}.mixer.linear_fc1", f"{hf}.mlp", arch, arch.ffn_hidden_size, arch.linear_bias)
        down = linear(
            f"{mlp}.mixer.linear_fc2", f"{hf}.mlp.down_proj", hidden_size, arch.ffn_hidden_size, arch.linear_bias
        )
        all_maps += [scaled(one, residual) for one in down]
    all_maps += [scaled(one, arch.logit_multiplier) for one in norm("decoder.final_norm", "model.norm", arch)]
    if not arch.tied_embeddings:
        all_maps.append(Vocabulary(("output_layer.weight",), ("lm_head.weight",), arch.vocab_size, hidden_size))
    return all_maps
