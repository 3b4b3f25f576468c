"""How tests build a model without the command line."""

from typing import Any

import torch
from megatron.core.models.hybrid.hybrid_model import HybridModel

from archscale_megatron.archs.architecture import Architecture
from archscale_megatron.model.config import config_of as config_of
from archscale_megatron.model.spec import build_model


def build(arch: Architecture, dtype: torch.dtype = torch.float32, seed: int = 1, **options: Any) -> HybridModel:
    """The whole model in one process, its vocabulary not padded."""
    config = config_of(arch, dtype, **options)
    return build_model(config, padded_vocab_size=arch.vocab_size, max_sequence_length=64, seed=seed)
