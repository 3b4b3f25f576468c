"""Small models of every family for the tests of `archscale_megatron.hf`, with random parameters."""

import dataclasses

import torch
from torch import Tensor

from archscale_megatron.archs.architecture import Architecture
from archscale_megatron.archs.build import build_architecture
from archscale_megatron.archs.families import FAMILIES
from archscale_megatron.hf.configuration_archscale import ArchScaleConfig
from archscale_megatron.hf.modeling_archscale import ArchScaleForCausalLM
from tests.lively import lively_values
from tests.reference import Reference

# Options that no family has: in every linear and attention layer, alone and with each other.
OPTIONS = {
    "transformer with options": {
        "attention_sink": True, "attention_gate": True, "qk_norm": True, "qkv_bias": True,
        "attention_output_bias": True, "linear_bias": True,
    },
    "sambayattn with options": {
        "differential_attention": True, "attention_gate": True, "qk_norm": True, "linear_bias": True,
        "normalization": "LayerNorm",
    },
    "transformer_gqa4_h2_moe": {"sparsity": 3, "top_k": 4},
    "sambay_gqa4_moe": {"sparsity": 2, "top_k": 4, "shared_expert": True, "sqrt_gate": True},
}  # fmt: skip
MODELS = (*FAMILIES, *(name for name in OPTIONS if name not in FAMILIES))
VOCABULARY = 64
# What a parametrisation sets; no two alike.
MULTIPLIERS = {"logit_multiplier": 0.7, "residual_multiplier": 0.4, "router_multiplier": 0.5, "softmax_scale": 0.6}


def architecture(model: str, tied: bool = True) -> Architecture:
    """Depth 8, width 40, windows of 5 and 9 tokens; with multipliers unless tied."""
    family = model.split()[0]
    own = family.startswith("transformer_")  # which are about their numbers of heads
    heads = {} if own else {"num_heads": 8, "num_kv_heads": 4}
    arch = build_architecture(
        family, 8, aspect_ratio=5, head_dim=8, local_window=5, context_length=18, vocab_size=VOCABULARY,
        tied_embeddings=tied, **heads, **OPTIONS.get(model, {}),
    )  # fmt: skip
    sizes = {"mamba2_head_dim": 10, "mamba2_state_size": 6, "gdn_head_dim": 15}
    return dataclasses.replace(arch, **sizes, **({} if tied else MULTIPLIERS))


def config_of(arch: Architecture, **options: object) -> ArchScaleConfig:
    renamed = {"tied_embeddings": "tie_word_embeddings", "top_k": "moe_top_k"}
    fields = {renamed.get(name, name): value for name, value in dataclasses.asdict(arch).items()}
    return ArchScaleConfig(**fields, **options)


def build(arch: Architecture, dtype: torch.dtype = torch.float64, **options: object) -> ArchScaleForCausalLM:
    """The model in evaluation mode, with parameters that make no layer negligible, nor any factor next to 1."""
    model = ArchScaleForCausalLM(config_of(arch, **options))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            parameter.copy_(lively_values(name, parameter.shape, generator))
    return model.to(dtype).eval()


def reference_of(arch: Architecture) -> Reference:
    return Reference(
        arch.family, arch.depth, arch.num_attention_heads, arch.num_query_groups, arch.window, arch.full_window,
        arch.rotary_base, None, arch.experts_per_token, arch.sqrt_gate, arch.logit_multiplier,
        arch.residual_multiplier, arch.router_multiplier, arch.softmax_scale,
    )  # fmt: skip


def reference_parameters(model: ArchScaleForCausalLM) -> dict[str, Tensor]:
    """The model's parameters under the names, and in the layouts, that `tests/reference.py` knows."""
    config, found = model.config, dict(model.named_parameters())
    whole = {"model.embed_tokens": "embedding.word_embeddings", "model.norm": "decoder.final_norm"}
    renamed = {
        ".q_proj.": ".linear_q.", ".o_proj.": ".linear_proj.", ".q_norm.": ".q_layernorm.", ".k_norm.": ".k_layernorm.",
        ".down_proj.": ".linear_fc2.", ".shared_expert.": ".shared_experts.", ".experts.": ".experts.local_experts.",
        ".sub_norm.": ".core_attention.sub_norm.", ".sink": ".core_attention.sink", "lm_head": "output_layer",
        ".lambda_": ".core_attention.lambda_", "model.layers.": "decoder.layers.", **whole,
    }  # fmt: skip
    parameters = {}
    for name in found:
        values: Tensor = found[name]
        if ".k_proj." in name or ".v_proj." in name or ".up_proj." in name:
            continue  # with the query, or the gate
        if ".q_proj." in name and name.replace("q_proj", "k_proj") in found:
            groups = config.num_query_groups
            parts = [
                found[name.replace("q_proj", part)].unflatten(0, (groups, -1))
                for part in ("q_proj", "k_proj", "v_proj")
            ]
            name, values = name.replace("q_proj", "linear_qkv"), torch.cat(parts, 1).flatten(0, 1)
        elif ".gate_proj." in name:
            up = found.get(name.replace("gate_proj", "up_proj"))
            name = name.replace("gate_proj", "linear_gate" if up is None else "linear_fc1")
            values = values if up is None else torch.cat([values, up])
        for ours, theirs in renamed.items():
            name = name.replace(ours, theirs)
        parameters[name] = values
    return parameters
