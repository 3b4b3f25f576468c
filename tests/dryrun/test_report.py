"""The table, and the bubble of a layout."""

from __future__ import annotations

from argparse import Namespace

import pytest

from archscale_megatron.archs.build import build_architecture
from archscale_megatron.archs.counts import layer_flops, output_flops
from archscale_megatron.dryrun.bubble import bubble
from archscale_megatron.dryrun.report import bubbles, table


def test_bubbles_of_a_layout() -> None:
    """Two virtual stages each; the last segment has the output layer, so that the last stage is the slowest."""
    arch = build_architecture("transformer", 8)
    args = Namespace(architecture=arch, hybrid_layer_pattern="|".join(["*-*-"] * 4), seq_length=1024,
                     pipeline_model_parallel_size=2, microbatch_group_size_per_vp_stage=None)  # fmt: skip
    equal, actual = bubbles(args, 4)
    assert equal == pytest.approx(1 / (4 * 2))
    layer = 2 * (layer_flops(arch, "*", 1024) + layer_flops(arch, "-", 1024))
    slowest, total = 2 * layer + output_flops(arch), 4 * layer + output_flops(arch)
    assert actual >= 2 * slowest / total - 1 + 1e-3
    assert actual == bubble([layer] * 3 + [layer + output_flops(arch)], 2, 4)


def test_table_names_every_number() -> None:
    memory = {"parameters": 2 << 30, "gradients": 4 << 30, "optimizer": 1 << 30, "activations": 8 << 30}
    stage = {"rank": 0, "layers": "m-", "parameters": 1 << 30, "memory": memory, "memory_total": 15 << 30, "sent": {}}
    found = {
        "model": {"family": "samba", "depth": 2},
        "layout": {"ranks": 16, "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 2,
                   "virtual_stages": 1, "data_parallel_size": 8, "micro_batches": 4, "tokens_per_step": 4096},
        "kernels": "fused", "parameters": 1234567, "vocabulary_padding": 89, "tied_copies": 1000,
        "bubble": {"equal_stages": 0.25, "these_stages": 0.5},
        "stages": [stage, stage | {"rank": 8, "layers": "W-", "sent": {"PP": 3 << 29, "EP": 0}}],
    }  # fmt: skip
    lines = table(found).splitlines()
    header = next(line for line in lines if line.startswith("stage"))
    assert header.split() == ["stage", "rank", "parameters", "weights", "gradients", "optimizer", "activations",
                              "total", "PP", "layers"]  # fmt: skip
    assert lines[lines.index(header) + 2].split() == [
        "1", "8", "1,073,741,824", "2.00", "4.00", "1.00", "8.00", "15.00", "1.50", "W-"
    ]  # fmt: skip
    text = "\n".join(lines)
    assert "1,234,567; 89 more pad the vocabulary; 1,000 more" in text and "25.0%" in text and "50.0%" in text
