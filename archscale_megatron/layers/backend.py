"""Where parameters are made, and by which linear layers: Transformer Engine's where asked for, else Megatron's."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn
from torch.distributed import ProcessGroup

Linear = Callable[..., nn.Module]  # a class of linear layers, or what builds one


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


def with_bias(linear: Linear, bias: bool) -> Linear:
    """`linear` with or without a bias, whatever the layer that builds it asks for: Megatron's config has one choice
    for all linears where an architecture has several."""

    def build(*args: Any, **kwargs: Any) -> nn.Module:
        return linear(*args, **kwargs | {"bias": bias})

    return build


def build_in_proj(
    linear: Linear,
    input_size: int,
    output_size: int,
    config: TransformerConfig,
    tp_group: ProcessGroup,
    stride: int = 1,
) -> nn.Module:
    """A column-parallel projection, without bias unless `linear` insists; `stride` blocks (x and z, say) of which each
    rank holds a slice."""
    return linear(
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
    linear: Linear, input_size: int, output_size: int, config: TransformerConfig, tp_group: ProcessGroup
) -> nn.Module:
    """A row-parallel projection, of an input whose channels are split over the ranks; biases as above."""
    return linear(
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
