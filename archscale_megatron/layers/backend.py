"""Where parameters are made, and by which linear layers: Transformer Engine's where asked for, else Megatron's."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.transformer.transformer_config import TransformerConfig


def backend_for(config: TransformerConfig) -> BackendSpecProvider:
    """The provider that `--transformer-impl` names; ValueError if it needs a package that is not there."""
    if config.transformer_impl == "transformer_engine":
        if not HAVE_TE:
            raise ValueError(
                "--transformer-impl transformer_engine: the package is not installed; install "
                "transformer-engine[pytorch], or use --transformer-impl local"
            )
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        return TESpecProvider()
    return LocalSpecProvider()


def parameter_options(config: TransformerConfig) -> dict[str, Any]:
    """`device` and `dtype` of a new parameter, chosen as Megatron's own linears do."""
    device = None if config.use_cpu_initialization else torch.cuda.current_device()
    return {"device": device, "dtype": config.params_dtype}
