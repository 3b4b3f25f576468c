"""Attention layers by themselves: differential attention in every form, and what a checkpoint holds of all options."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from archscale_megatron.layers.differential_attention import DifferentialAttention
from tests.launch import torchrun
from tests.layers.save_checkpoint import random_model
from tests.model.building import config_of
from tests.parallel.layouts import tiny

pytestmark = pytest.mark.usefixtures("one_process")

LENGTH, BATCH, HEADS, KV_HEADS, HEAD_DIM = 23, 2, 12, 6, 8


def softmax_row(query: Tensor, keys: Tensor, begin: int, at: int) -> Tensor:
    logits = torch.stack([(query * keys[u]).sum() / math.sqrt(HEAD_DIM) for u in range(begin, at + 1)])
    return logits.exp() / logits.exp().sum()


def differential(
    query: Tensor, key: Tensor, value: Tensor, p: dict[str, Tensor], layer: int, first_seen: list
) -> Tensor:
    """One pair of heads and one token at a time; `first_seen[row][t]` is the first token that t sees."""
    start = 0.8 - 0.6 * math.exp(-0.3 * layer)
    one, two = (sum(p[f"lambda_q{i}"] * p[f"lambda_k{i}"]).exp() for i in (1, 2))
    factor = one - two + start
    out = torch.zeros_like(query)
    for row in range(BATCH):
        for pair in range(HEADS // 2):
            kv = 2 * (pair // (HEADS // KV_HEADS))
            values = torch.cat([value[:, row, kv], value[:, row, kv + 1]], -1)
            for t in range(LENGTH):
                begin = first_seen[row][t]
                maps = [softmax_row(query[t, row, 2 * pair + i], key[:, row, kv + i], begin, t) for i in (0, 1)]
                y = (maps[0] - factor * maps[1]) @ values[begin : t + 1]
                y = y / (y.square().mean() + 1e-5).sqrt() * p["sub_norm.weight"] * (1 - start)
                out[t, row, 2 * pair], out[t, row, 2 * pair + 1] = y[:HEAD_DIM], y[HEAD_DIM:]
    return out


@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("window", [None, 2, 5])
@pytest.mark.parametrize("layer_number", [1, 11, 12])
def test_differential_attention(layer_number: int, window: int | None, documents: bool) -> None:
    """Values and gradients; layers 11 and 12 of the pattern are of the same, sixth, ArchScale layer."""
    config = config_of(tiny("sambayda"), num_attention_heads=HEADS, num_query_groups=KV_HEADS, kv_channels=HEAD_DIM)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    module = DifferentialAttention(config, layer_number, groups, window=window)
    generator = torch.Generator().manual_seed(layer_number)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(draw(*parameter.shape) * 0.3 + (name == "sub_norm.weight"))
    sizes = (LENGTH, BATCH, HEADS, HEAD_DIM), *[(LENGTH, BATCH, KV_HEADS, HEAD_DIM)] * 2
    inputs = [draw(*size).cuda().requires_grad_() for size in sizes]
    starts = torch.zeros(LENGTH, BATCH, dtype=torch.bool)
    starts[4, 0] = starts[5, 0] = starts[17, 1] = documents
    first_seen = [
        [
            max([u for u in range(t + 1) if starts[u, row]] + [0] + ([t - window + 1] if window else []))
            for t in range(LENGTH)
        ]
        for row in range(BATCH)
    ]
    got = module(*inputs, starts.cuda() if documents else None)
    exact = [x.detach().double().cpu().requires_grad_() for x in inputs]
    p = {name: x.detach().double().cpu().requires_grad_() for name, x in module.named_parameters()}
    expected = differential(*exact, p, (layer_number - 1) // 2, first_seen)
    weights = draw(*sizes[0])
    got_gradients = torch.autograd.grad(got, [*inputs, *module.parameters()], weights.cuda())
    expected_gradients = torch.autograd.grad(expected, [*exact, *p.values()], weights.double())
    for a, e in zip((got, *got_gradients), (expected, *expected_gradients), strict=True):
        assert (a.double().cpu() - e).abs().max() <= 1e-5 * max(e.abs().max(), 1)


def test_checkpoint_of_two_ranks_is_the_whole_model(tmp_path: Path) -> None:
    """Sinks, gates and biases in parts, lambdas and norms of heads as copies: put together, what one process has."""
    families = ("transformersa with options", "phi4miniflash")
    torchrun(2, "-m", "tests.layers.save_checkpoint", str(tmp_path), *families)
    for family in families:
        stored = dist_checkpointing.load_plain_tensors(str(tmp_path / family))
        model = random_model(family, tp=1)
        for name, parameter in model.named_parameters():
            assert torch.equal(stored.pop(name), parameter.cpu()), name
        assert not [name for name, value in stored.items() if isinstance(value, Tensor)]
