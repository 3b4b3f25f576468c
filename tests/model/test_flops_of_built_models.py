"""The FLOP counts of archs/counts.py against torch's own counter, on models that run.

A product with a weight is a matrix product (aten.mm, aten.addmm) there, whatever mixes tokens is a batch of them
(aten.bmm) or no product at all: the two kinds are compared separately. The counter knows neither recurrences nor
convolutions that are written as shifted sums, so the FLOPs of scans have nothing to be compared with here.
Attention runs as plain products, of which the counter sees all s x s, not only the causal part, and what
ops/attention.py pads for its kernels' sake: queries and keys to the width of the values of differential attention, and
a channel and a token for a sink. What is computed in vain is no FLOP of the model.
"""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from archscale_megatron.archs.architecture import Architecture
from archscale_megatron.archs.build import build_architecture
from archscale_megatron.archs.counts import matrix_elements, mixing_flops, output_flops
from archscale_megatron.archs.families import FAMILIES
from tests.model.building import build

pytestmark = pytest.mark.usefixtures("one_process")

BATCH, LENGTH = 2, 24
TOKENS = BATCH * LENGTH
aten = torch.ops.aten
MATRIX, BATCHED = (aten.mm, aten.addmm), (aten.bmm, aten.baddbmm)


def count(arch: Architecture, backward: bool) -> dict[str, dict]:
    """Module -> operation -> FLOPs of one batch, "Global" for all."""
    model = build(arch)
    tokens = torch.zeros(BATCH, LENGTH, dtype=torch.long).cuda()
    positions = torch.arange(LENGTH, device=tokens.device).expand_as(tokens)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss = model(tokens, positions, None, labels=tokens).sum()
        if backward:
            loss.backward()
    return counter.get_flop_counts()


def of(operations: tuple, counts: dict) -> float:
    return sum(counts.get(operation, 0) for operation in operations)


@pytest.mark.parametrize("family", FAMILIES)
def test_matrix_products(family: str) -> None:
    """0.1 % is what is promised; they are equal. A training step has three times those of the forward pass."""
    arch = build_architecture(
        family, 8, aspect_ratio=16, head_dim=16, num_heads=8, num_kv_heads=4, local_window=LENGTH, vocab_size=96
    )
    counts = count(arch, backward=False)
    (prefix,) = {name.removesuffix(".layers.0") for name in counts if name.endswith("decoder.layers.0")}
    layers = [of(MATRIX, counts[f"{prefix}.layers.{i}"]) / TOKENS for i in range(len(arch.pattern))]
    expected = [2 * matrix_elements(arch, symbol) for symbol in arch.pattern]
    assert layers == pytest.approx(expected, rel=1e-9)
    forward = sum(expected) + output_flops(arch)
    assert of(MATRIX, counts["Global"]) / TOKENS == pytest.approx(forward, rel=1e-9)
    assert of(MATRIX, count(arch, backward=True)["Global"]) / TOKENS == pytest.approx(3 * forward, rel=1e-9)

    for i, symbol in enumerate(arch.pattern):
        if symbol in "W*X" and (symbol == "W" or not arch.full_window):
            scores = of(BATCHED, counts[f"{prefix}.layers.{i}"]) / TOKENS
            padded = 4 / 3 if arch.differential_attention else 1.0
            if arch.attention_sink:
                padded *= (1 + 1 / arch.head_dim) * (1 + 1 / LENGTH) ** 2
            causal = (LENGTH + 1) / (2 * LENGTH)
            assert scores * causal / padded == pytest.approx(mixing_flops(arch, symbol, LENGTH))
