"""Which optimizer each parameter of every family goes to."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from archscale_megatron.archs.architecture import MAMBA1
from archscale_megatron.optimizers.routing import _muonh_arguments, optimizer_of
from tests.model import building
from tests.parallel.layouts import MODELS, tiny

MATRICES = re.compile(
    r".*\.(linear_qkv|linear_q|linear_proj|linear_gate|linear_fc1|linear_fc2|router|in_proj|x_proj|dt_proj|out_proj)\.weight"
)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("model", MODELS)
def test_every_parameter_of_every_family(model: str) -> None:
    tied = len(model) % 2 == 0  # of each, some
    found: dict[str, set[str]] = {"muonh": set(), "adamh": set(), "adam": set()}
    for name, parameter in building.build(tiny(model, tied)).named_parameters():
        assert (optimizer_of(name, parameter, "muon") == "muon") == (MATRICES.fullmatch(name) is not None), name
        assert optimizer_of(name, parameter, "adam") == "adam"
        found[optimizer_of(name, parameter, "muonh")].add(name)
    assert all(MATRICES.fullmatch(name) for name in found["muonh"])
    assert not any(MATRICES.fullmatch(name) for name in found["adam"] | found["adamh"])
    # 2-D, and neither a matrix nor the input embedding
    assert ("output_layer.weight" in found["adamh"]) == (not tied)
    assert "embedding.word_embeddings.weight" in found["adam"]
    assert all(name.endswith("A_log") for name in found["adamh"] - {"output_layer.weight"})
    assert any(name.endswith("A_log") for name in found["adamh"]) == (MAMBA1 in tiny(model).pattern)


def test_the_embedding_s_copy_on_the_last_stage_is_the_embedding() -> None:
    copy = nn.Parameter(torch.ones(4, 2))
    copy.shared_embedding = True  # type: ignore[attr-defined]
    assert optimizer_of("output_layer.weight", copy, "muonh") == "adam"


def test_a_matrix_of_zeros_is_refused() -> None:
    """Of norm 0, it would never change."""
    parameters = {"module.output_layer.weight": nn.Parameter(torch.zeros(4, 2))}
    chunk = SimpleNamespace(named_parameters=parameters.items)
    with pytest.raises(ValueError, match=r"keeps the norm of module\.output_layer\.weight, which is zero"):
        _muonh_arguments(None, [chunk], None)
