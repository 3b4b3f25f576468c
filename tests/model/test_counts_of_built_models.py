"""The formulas of archs/counts.py against models that are built, on the meta device: no memory is taken."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from archscale_megatron.archs.architecture import Architecture
from archscale_megatron.archs.build import build_architecture
from archscale_megatron.archs.counts import (
    embedding_parameters,
    layer_parameters,
    non_embedding_parameters,
    parameters,
)
from archscale_megatron.archs.families import FAMILIES
from tests.model.building import build

pytestmark = pytest.mark.usefixtures("one_process")


class RealMemory(TorchDispatchMode):
    """Elements of the largest tensor that is not on the meta device, of those that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **kwargs or {})
        if isinstance(result, torch.Tensor) and not result.is_meta:
            self.largest = max(self.largest, result.numel())
        return result


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# Differential attention pairs key-value heads, so not every depth is one of these.
DEPTHS = {"sambayda": [8, 16, 24], "phi4miniflash": [16, 32]}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    ("family", "depth"), [(family, depth) for family in FAMILIES for depth in DEPTHS.get(family, [8, 12, 16, 20, 24])]
)
def test_built_model_has_the_counted_parameters(family: str, depth: int, tied: bool) -> None:
    assert_counted(build_architecture(family, depth, tied_embeddings=tied))


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("transformer", {"attention_sink": True, "attention_gate": True, "qk_norm": True, "linear_bias": True}),
        ("sambay", {"attention_gate": True, "qkv_bias": True, "linear_bias": True}),
        ("sambay", {"differential_attention": True, "qk_norm": True, "attention_output_bias": True}),
    ],
)
def test_options_have_the_counted_parameters(family: str, options: dict[str, bool]) -> None:
    assert_counted(build_architecture(family, 8, **options))


def assert_counted(arch: Architecture) -> None:
    with torch.device("meta"), RealMemory() as real:
        model = build(arch, use_cpu_initialization=True, init_model_with_meta_device=True)
    assert real.largest <= arch.head_dim  # RoPE's frequencies
    assert count(model) == parameters(arch)
    assert count(model.decoder) == non_embedding_parameters(arch)
    assert count(model) - count(model.decoder) == embedding_parameters(arch)
    built = [count(layer) for layer in model.decoder.layers]
    assert built == [layer_parameters(arch, symbol) for symbol in arch.pattern]
