"""The tiny models that are exported in tests, and what is asked of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from archscale_megatron.archs.architecture import Architecture
from archscale_megatron.archs.build import build_architecture
from archscale_megatron.archs.families import FAMILIES
from archscale_megatron.mup.rules import Parametrization

VOCABULARY, PADDED = 100, 128
BATCH, SEQUENCE = 2, 12  # several windows
ALL_OPTIONS = {
    "attention_gate": True, "qk_norm": True, "qkv_bias": True, "attention_output_bias": True, "linear_bias": True,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "transformer_gqa4_h2_moe": {"sparsity": 3, "top_k": 2},
    "sambay_gqa4_moe": {"sparsity": 2, "top_k": 4, "shared_expert": True, "sqrt_gate": True},
    # Five scans in turn; at half of the width Megatron's own logits are 2e-5 off those in float64.
    "gdny": {"aspect_ratio": 10},
    # Their heads are as wide together as the model, as in Phi-4-mini-flash.
    "phi4miniflash": {"head_dim": 5},
    # What no family has, in every kind of attention, linear layer and norm.
    "transformer-with-biases": {"qkv_bias": True, "attention_output_bias": True, "linear_bias": True},
    "transformersa-with-options": ALL_OPTIONS,
    "sambayattn-with-options": ALL_OPTIONS | {"differential_attention": True, "normalization": "LayerNorm"},
}  # fmt: skip
MODELS = (*FAMILIES, *(model for model in OWN if "-" in model))


def architecture(model: str, tied: bool) -> Architecture:
    """Width 40, heads of 8 channels, in μP++ with all multipliers other than 1."""
    family = model.split("-")[0]
    depth = 4 if family in ("transformer", "transformer_mha", "transformerls", "transformersa", "mamba", "samba") else 8
    # Of the others, `transformer_*` are about their numbers of heads.
    heads = {} if family.startswith("transformer_") else {"num_heads": 8, "num_kv_heads": 4}
    options = {"aspect_ratio": 40 // depth, "head_dim": 8, "local_window": 5, **heads, **OWN.get(model, {})}
    arch = build_architecture(
        family, depth, context_length=18, vocab_size=VOCABULARY, tied_embeddings=tied,
        **options,
    )  # fmt: skip
    # 8 heads of 10 channels, 2 heads with keys of 15.
    arch = dataclasses.replace(arch, mamba2_head_dim=10, mamba2_state_size=6, gdn_head_dim=15)
    return Parametrization("mup++", width_ratio=0.7, base_head_dim=24).apply(arch)


def tokens() -> Tensor:
    """int64 [b, s]."""
    return torch.randint(VOCABULARY, (BATCH, SEQUENCE), generator=torch.Generator().manual_seed(11))


def directory_of(model: str, tied: bool) -> str:
    """Name of a model's run directory."""
    return f"{model}.{'tied' if tied else 'untied'}"
