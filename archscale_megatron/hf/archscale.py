"""ArchScaleForCausalLM: the export of every family, with our own model class beside the weights.

The weights are exactly the trained ones; the multipliers are in config.json and the model class applies them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from archscale_megatron.archs.architecture import (
    CROSS_ATTENTION,
    GATED_DELTA_NET,
    GMU,
    MAMBA1,
    MAMBA2,
    MLP,
    MOE,
    SELF_ATTENTION,
    Architecture,
)
from archscale_megatron.hf.kinds import QKV, Experts, Map, Vocabulary, copied, joined, split

NAME = "archscale"
FILES = ("configuration_archscale.py", "modeling_archscale.py")
"""What lies beside the weights."""
DEFAULT_CONTEXT_LENGTH = 4096
RENAMED = {"tied_embeddings": "tie_word_embeddings", "top_k": "moe_top_k"}
"""Fields of Architecture whose names in config.json are transformers' own, or must not be."""
_FIELDS = {field.name: RENAMED.get(field.name, field.name) for field in dataclasses.fields(Architecture)}


def fits(arch: Architecture) -> bool:
    """Whether this format can hold a model of `arch`: always."""
    del arch
    return True


def context_length(run: dict[str, Any]) -> int:
    """Tokens of a training sequence, of a `run.json`."""
    options = run.get("options", {})
    return options.get("max_position_embeddings") or options.get("seq_length") or DEFAULT_CONTEXT_LENGTH


def config(arch: Architecture, run: dict[str, Any]) -> dict[str, Any]:
    """config.json, without what does not follow from the architecture and the run."""
    values = dataclasses.asdict(arch)
    return {
        "model_type": "archscale",
        "architectures": ["ArchScaleForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_archscale.ArchScaleConfig",
            "AutoModelForCausalLM": "modeling_archscale.ArchScaleForCausalLM",
        },
        "max_position_embeddings": context_length(run),
    } | {name: values[field] for field, name in _FIELDS.items()}


def architecture(config: dict[str, Any]) -> Architecture:
    """The inverse of `config`.

    Raises:
        ValueError: a field is missing, or no such model can be.
    """
    if missing := [name for name in _FIELDS.values() if name not in config]:
        raise ValueError(f"config.json lacks {', '.join(missing)}; export the model again")
    return Architecture(**{field: config[name] for field, name in _FIELDS.items()})


def maps(arch: Architecture) -> list[Map]:
    """A map for each parameter, in the order of the model."""
    embedding = ("embedding.word_embeddings.weight",), ("model.embed_tokens.weight",)
    all_maps: list[Map] = [Vocabulary(*embedding, arch.vocab_size, arch.hidden_size)]
    for index, symbol in enumerate(arch.pattern):
        megatron, hf = f"decoder.layers.{index}", f"model.layers.{index}"
        all_maps += norm(f"{megatron}.norm", f"{hf}.norm", arch)
        all_maps += _mixer(symbol)(arch, f"{megatron}.mixer", f"{hf}.mixer")
    all_maps += norm("decoder.final_norm", "model.norm", arch)
    if not arch.tied_embeddings:
        all_maps.append(Vocabulary(("output_layer.weight",), ("lm_head.weight",), arch.vocab_size, arch.hidden_size))
    return all_maps


def norm(megatron: str, hf: str, arch: Architecture) -> list[Map]:
    """A norm of the residual stream."""
    names = ["weight", "bias"] if arch.normalization == "LayerNorm" else ["weight"]
    return [copied(f"{megatron}.{name}", f"{hf}.{name}", (arch.hidden_size,)) for name in names]


def weight_and_bias(hidden_size: int, bias: bool) -> dict[str, tuple[int, ...]]:
    """The dimensions behind the rows of a projection's parameters."""
    return {"weight": (hidden_size,)} | ({"bias": ()} if bias else {})


def linear(megatron: str, hf: str, rows: int, columns: int, bias: bool = False) -> list[Map]:
    """A projection that both sides have alike."""
    parameters = weight_and_bias(columns, bias).items()
    return [copied(f"{megatron}.{name}", f"{hf}.{name}", (rows, *rest)) for name, rest in parameters]


def query_factor(arch: Architecture) -> float:
    """What the softmax scale is beyond 1 / sqrt(head_dim), for formats that fold it into the queries."""
    return 1.0 if arch.softmax_scale is None else arch.softmax_scale * math.sqrt(arch.head_dim)


def qkv(megatron: str, hf: str, arch: Architecture) -> list[QKV]:
    """q, k and v of self-attention."""
    return [
        QKV(
            (f"{megatron}.linear_qkv.{name}",),
            tuple(f"{hf}.{projection}_proj.{name}" for projection in "qkv"),
            arch.num_attention_heads, arch.num_query_groups, arch.head_dim, rest,
        )
        for name, rest in weight_and_bias(arch.hidden_size, arch.qkv_bias).items()
    ]  # fmt: skip


def gate_up(megatron: str, hf: str, arch: Architecture, size: int, bias: bool = False) -> list[Map]:
    """The fused first projection of an MLP."""
    return [
        split(f"{megatron}.{name}", [f"{hf}.gate_proj.{name}", f"{hf}.up_proj.{name}"], size, rest)
        for name, rest in weight_and_bias(arch.hidden_size, bias).items()
    ]


def _attention(arch: Architecture, megatron: str, hf: str) -> Iterator[Map]:
    yield from qkv(megatron, hf, arch)
    if arch.qk_norm:
        for name in "qk":
            yield copied(f"{megatron}.{name}_layernorm.weight", f"{hf}.{name}_norm.weight", (arch.head_dim,))
    yield from _heads_and_output(arch, megatron, hf)


def _cross_attention(arch: Architecture, megatron: str, hf: str) -> Iterator[Map]:
    yield from linear(f"{megatron}.linear_q", f"{hf}.q_proj", arch.query_size, arch.hidden_size, arch.qkv_bias)
    yield from _heads_and_output(arch, megatron, hf)


def _heads_and_output(arch: Architecture, megatron: str, hf: str) -> Iterator[Map]:
    heads, hidden_size, core = arch.num_attention_heads, arch.hidden_size, f"{megatron}.core_attention"
    if arch.attention_gate:
        yield from linear(f"{megatron}.linear_gate", f"{hf}.gate_proj", heads, hidden_size, arch.qkv_bias)
    if arch.attention_sink:
        yield copied(f"{core}.sink", f"{hf}.sink", (heads,))
    if arch.differential_attention:
        for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
            yield copied(f"{core}.{name}", f"{hf}.{name}", (arch.head_dim,))
        yield copied(f"{core}.sub_norm.weight", f"{hf}.sub_norm.weight", (2 * arch.head_dim,))
    bias = arch.attention_output_bias
    yield from linear(f"{megatron}.linear_proj", f"{hf}.o_proj", hidden_size, arch.query_size, bias)


def mamba1(arch: Architecture, megatron: str, hf: str) -> Iterator[Map]:
    """All parameters of a Mamba-1 mixer, which both sides name alike."""
    d, hidden_size = arch.d_inner, arch.hidden_size
    shapes = {
        "in_proj.weight": (2 * d, hidden_size),
        "conv1d.weight": (d, 1, arch.conv_kernel),
        "conv1d.bias": (d,),
        "x_proj.weight": (arch.dt_rank + 2 * arch.state_size, d),
        "dt_proj.weight": (d, arch.dt_rank),
        "dt_proj.bias": (d,),
        "A_log": (d, arch.state_size),
        "D": (d,),
        "out_proj.weight": (hidden_size, d),
    }
    for name, shape in shapes.items():
        yield copied(f"{megatron}.{name}", f"{hf}.{name}", shape)


def _mamba2(arch: Architecture, megatron: str, hf: str) -> Iterator[Map]:
    d, state, heads = arch.mamba2_d_inner, arch.mamba2_state_size, arch.mamba2_heads
    convolved = {"x": d, "B": state, "C": state}
    projected = {"z": d} | convolved | {"dt": heads}
    yield joined(f"{megatron}.in_proj.weight", projected, f"{hf}.in_proj.weight", (arch.hidden_size,))
    yield joined(f"{megatron}.conv1d.weight", convolved, f"{hf}.conv1d.weight", (1, arch.conv_kernel))
    yield joined(f"{megatron}.conv1d.bias", convolved, f"{hf}.conv1d.bias")
    for name in ("A_log", "D", "dt_bias"):
        yield copied(f"{megatron}.{name}", f"{hf}.{name}", (heads,))
    yield copied(f"{megatron}.norm.weight", f"{hf}.norm.weight", (d,))
    yield from linear(f"{megatron}.out_proj", f"{hf}.out_proj", arch.hidden_size, d)


def _gated_delta_net(arch: Architecture, megatron: str, hf: str) -> Iterator[Map]:
    keys, values, heads = arch.gdn_key_size, 2 * arch.gdn_key_size, arch.gdn_heads
    convolved = {"query": keys, "key": keys, "value": values}
    projected = convolved | {"z": values, "beta": heads, "alpha": heads}
    yield joined(f"{megatron}.in_proj.weight", projected, f"{hf}.in_proj.weight", (arch.hidden_size,))
    yield joined(f"{megatron}.conv1d.weight", convolved, f"{hf}.conv1d.weight", (1, arch.conv_kernel))
    for name in ("A_log", "dt_bias"):
        yield copied(f"{megatron}.{name}", f"{hf}.{name}", (heads,))
    yield copied(f"{megatron}.norm.weight", f"{hf}.norm.weight", (values,))
    yield from linear(f"{megatron}.out_proj", f"{hf}.out_proj", arch.hidden_size, values)


def _gmu(arch: Architecture, megatron: str, hf: str) -> Iterator[Map]:
    memory, hidden_size, bias = arch.memory_size, arch.hidden_size, arch.linear_bias
    yield from linear(f"{megatron}.in_proj", f"{hf}.in_proj", memory, hidden_size, bias)
    if arch.normalizes_memory:
        yield copied(f"{megatron}.norm.weight", f"{hf}.norm.weight", (memory,))
    yield from linear(f"{megatron}.out_proj", f"{hf}.out_proj", hidden_size, memory, bias)


def _mlp(arch: Architecture, megatron: str, hf: str) -> Iterator[Map]:
    size, bias = arch.ffn_hidden_size, arch.linear_bias
    yield from gate_up(f"{megatron}.linear_fc1", hf, arch, size, bias)
    yield from linear(f"{megatron}.linear_fc2", f"{hf}.down_proj", arch.hidden_size, size, bias)


def _moe(arch: Architecture, megatron: str, hf: str) -> Iterator[Map]:
    count, size, hidden_size = arch.num_experts, arch.expert_ffn_size, arch.hidden_size
    experts = [f"{hf}.experts.{e}" for e in range(count)]
    fused = tuple(f"{expert}.{part}_proj.weight" for expert in experts for part in ("gate", "up"))
    down = tuple(f"{expert}.down_proj.weight" for expert in experts)
    yield from linear(f"{megatron}.router", f"{hf}.router", count, hidden_size)
    yield Experts((f"{megatron}.experts.experts.linear_fc1.weight",), fused, count, size, hidden_size)
    yield Experts((f"{megatron}.experts.experts.linear_fc2.weight",), down, count, hidden_size, size)
    if arch.shared_expert:
        yield from gate_up(f"{megatron}.shared_experts.linear_fc1", f"{hf}.shared_expert", arch, size)
        down_proj = f"{hf}.shared_expert.down_proj"
        yield from linear(f"{megatron}.shared_experts.linear_fc2", down_proj, hidden_size, size)


def _mixer(symbol: str) -> Any:
    return {
        MAMBA1: mamba1,
        MAMBA2: _mamba2,
        GATED_DELTA_NET: _gated_delta_net,
        **dict.fromkeys(SELF_ATTENTION, _attention),
        CROSS_ATTENTION: _cross_attention,
        GMU: _gmu,
        MLP: _mlp,
        MOE: _moe,
    }[symbol]
