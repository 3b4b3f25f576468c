"""Where parameters are made, and by which linear layers: Transformer Engine's where asked for, else Megatron's."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn
from torch.distributed import ProcessGroup


def backend_for(config: TransformerConfig | Namespace) -> BackendSpecProvider:
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


def build_in_proj(
    linear: type, input_size: int, output_size: int, config: TransformerConfig, tp_group: ProcessGroup, stride: int = 1
) -> nn.Module:
    """A column-parallel projection without bias; `stride` blocks (x and z, say) of which each rank holds a slice."""
    return build_module(
        linear,
        input_size,
        output_size,
        config=config,
        init_method=config.init_method,
        gather_output=False,
        bias=False,
        skip_bias_add=False,
        is_expert=False,
        tp_group=tp_group,
        stride=stride,
    )


def build_out_proj(
    linear: type, input_size: int, output_size: int, config: TransformerConfig, tp_group: ProcessGroup
) -> nn.Module:
    """A row-parallel projection without bias, of an input whose channels are split over the ranks."""
    return build_module(
        linear,
        input_size,
        output_size,
        config=config,
        init_method=config.output_layer_init_method,
        bias=False,
        input_is_parallel=True,
        skip_bias_add=True,
        is_expert=False,
        tp_group=tp_group,
    )
