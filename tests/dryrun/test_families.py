"""Every family, and every option that changes what a layer computes, on a tiny model."""

from __future__ import annotations

from typing import Any

import pytest

from archscale_megatron.archs.build import build_architecture
from archscale_megatron.archs.counts import parameters
from archscale_megatron.archs.families import FAMILIES
from tests.dryrun.runs import dry_runs

TINY: dict[str, Any] = {"aspect_ratio": 8, "head_dim": 8, "vocab_size": 512}
LENGTH = 64
OVERRIDES: dict[str, dict[str, Any]] = {
    family: {"num_kv_heads": 2} if family == "phi4miniflash" else {"sparsity": 4, "top_k": 2}
    for family in ("phi4miniflash", "sambay_gqa4_moe", "transformer_gqa4_h2_moe")
}
# name: family, what else of the architecture, other options; tensor parallel where the architecture can be
OPTIONS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    family: (family, OVERRIDES.get(family, {}), []) for family in FAMILIES
} | {
    "all_to_all": (
        "transformer_gqa4_h2_moe", {"sparsity": 4, "top_k": 2},
        ["--expert-model-parallel-size", "4", "--gpus-per-node", "16", "--moe-token-dispatcher-type", "alltoall"],
    ),
    # 15 routed experts, which cannot all get as many tokens
    "shared_expert": (
        "sambay_gqa4_moe", {"sparsity": 4, "top_k": 4, "shared_expert": True},
        ["--expert-model-parallel-size", "3", "--expert-tensor-parallel-size", "1", "--gpus-per-node", "12",
         "--moe-token-dispatcher-type", "alltoall"],
    ),
    "documents": ("sambay", {}, ["--reset-at-eod", "--micro-batch-size", "2"]),
    "documents_of_sinks": ("transformersa", {}, ["--reset-at-eod"]),
    "documents_in_torch": ("samba", {}, ["--reset-at-eod", "--kernels", "torch"]),
    "attention": ("transformer", {"attention_gate": True, "qk_norm": True}, ["--cross-entropy", "chunked"]),
}  # fmt: skip


def architecture_of(name: str) -> Any:
    family, overrides, _ = OPTIONS[name]
    return build_architecture(family, 8, context_length=LENGTH, **TINY, **overrides)


def options_of(name: str) -> list[str]:
    family, overrides, options = OPTIONS[name]
    words = ["--train-model", family, "--depth", "8", "--seq-length", str(LENGTH), "--micro-batch-size", "1", "--bf16"]
    words += ["--pipeline-model-parallel-size", "2"]
    for field, value in (TINY | overrides).items():
        option = {"qk_norm": "--qk-layernorm"}.get(field, f"--{field.replace('_', '-')}")
        words += [option] if value is True else [option, str(value)]
    if 2 in architecture_of(name).tensor_parallel_sizes():
        words += ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
    return [*words, *options]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return dict(zip(OPTIONS, dry_runs([options_of(name) for name in OPTIONS]), strict=True))


@pytest.mark.parametrize("name", OPTIONS)
def test_parameters_of_all_ranks_are_the_architectures(found: dict[str, Any], name: str) -> None:
    code, result = found[name]
    assert code == 0, result
    arch = architecture_of(name)
    assert result["parameters"] == parameters(arch) and not result["vocabulary_padding"]
    assert result["tied_copies"] == arch.vocab_size * arch.hidden_size
    assert all(stage["memory"]["activations"] > 0 for stage in result["stages"])
    assert "other" not in result["stages"][0]["sent"]


def test_tokens_of_experts(found: dict[str, Any]) -> None:
    """Four ranks: three in four of a rank's choices go to others and come back, twice a step. A choice is a token in
    bf16, h wide, and its fp32 weight besides; how many each expert gets is gathered, int64, over 4 x tp ranks."""
    result, arch = found["all_to_all"][1], architecture_of("all_to_all")
    tp, microbatches = result["layout"]["tensor_model_parallel_size"], result["layout"]["micro_batches"]
    choices = 3 / 4 * LENGTH / tp * arch.experts_per_token
    sent = choices * (4 * 2 * arch.hidden_size + 2 * 4) + (4 * tp - 1) * 8 * arch.num_experts
    for stage in result["stages"]:
        assert stage["sent"]["EP"] == stage["layers"].count("E") * microbatches * sent
