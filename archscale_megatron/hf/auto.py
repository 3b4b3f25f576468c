"""Our own model class for transformers' Auto classes: an archscale folder then loads without running its own code."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM

from archscale_megatron.hf.configuration_archscale import ArchScaleConfig
from archscale_megatron.hf.modeling_archscale import ArchScaleForCausalLM


def register() -> None:
    """From now on AutoConfig and AutoModelForCausalLM know `"model_type": "archscale"`, unless asked to trust a
    folder's code."""
    AutoConfig.register(ArchScaleConfig.model_type, ArchScaleConfig, exist_ok=True)
    AutoModelForCausalLM.register(ArchScaleConfig, ArchScaleForCausalLM, exist_ok=True)
