"""The formulas of archs/counts.py against models that are built, on the meta device: no memory is taken."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

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


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("depth", [8, 12, 16, 20, 24])
@pytest.mark.parametrize("family", FAMILIES)
def test_built_model_has_the_counted_parameters(family: str, depth: int, tied: bool) -> None:
    arch = build_architecture(family, depth, tied_embeddings=tied)
    with torch.device("meta"), RealMemory() as real:
        model = build(arch, use_cpu_initialization=True, init_model_with_meta_device=True)
    assert real.largest <= arch.head_dim  # RoPE's frequencies
    assert count(model) == parameters(arch)
    assert count(model.decoder) == non_embedding_parameters(arch)
    assert count(model) - count(model.decoder) == embedding_parameters(arch)
    built = [count(layer) for layer in model.decoder.layers]
    assert built == [layer_parameters(arch, symbol) for symbol in arch.pattern]
