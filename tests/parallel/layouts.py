"""Named parallel layouts, and the tiny model of each family that they are compared on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from archscale_megatron.archs.architecture import PIPE, Architecture
from archscale_megatron.archs.build import build_architecture
from archscale_megatron.archs.families import FAMILIES
from archscale_megatron.archs.splits import split_by_compute
from archscale_megatron.mup.rules import Name

SEQUENCE_LENGTH = 32
TINY = {
    "depth": 8, "aspect_ratio": 8, "head_dim": 8, "local_window": 7, "context_length": SEQUENCE_LENGTH,
    "vocab_size": 96,
}  # fmt: skip
PAIRS = {"num_heads": 8, "num_kv_heads": 4}  # differential attention needs two key-value heads a rank
# What a model has besides.
OWN: dict[str, dict[str, Any]] = {
    "transformerga": PAIRS, "sambayda": PAIRS, "phi4miniflash": PAIRS,
    "transformer_gqa4_h2_moe": {"sparsity": 3, "top_k": 4},
    # 8 experts besides the shared one, of which a token has 2
    "sambay_gqa4_moe": {"aspect_ratio": 9, "sparsity": 3, "top_k": 3, "shared_expert": True, "sqrt_gate": True},
    "transformersa with options": {
        "attention_gate": True, "qk_norm": True, "qkv_bias": True, "attention_output_bias": True, "linear_bias": True,
    },
}  # fmt: skip
MODELS = (*FAMILIES, "transformersa with options")
EXPERTS = tuple(name for name, family in FAMILIES.items() if family(TINY["depth"]).top_k)
# Experts, biases, fused and separate projections; the gradient of a lambda may all but cancel, and then be rounding.
MUON = ("sambay", "sambay_gqa4_moe", "transformersa with options", "sgdny")
DENSE = tuple(model for model in MODELS if model not in EXPERTS)
GLOBAL_BATCH, MICRO_BATCH = 8, 2
END_OF_DOCUMENT = 0
RUNS = "runs.json"  # file name of what the worker is to run


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel groups; `ep` divides the ranks of `tp` and `dp` together, `etp` is `tp` of the experts.

    `varlen` has documents that end inside of the sequences; `rounded` is the seed by which each initial weight moves by
    up to its last bit, or 0; `overlap` hides data-parallel communication behind computation; `cuts` are the hybrid
    layers before which a stage starts (by compute if empty); `optimizer` is Megatron's, `parametrization` one of
    `mup.rules`; `config` are further fields of the config; `only` names the models that it is for. The auxiliary loss
    of experts is not linear in the micro-batches, so `micro_batch` is what a reference must agree in.
    """

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    dp: int = 1
    ep: int = 1
    etp: int | None = None
    sp: bool = False
    bf16: bool = False
    overlap: bool = False
    tied: bool = True
    varlen: bool = False
    rounded: int = 0
    cuts: tuple[int, ...] = ()
    optimizer: str = "adam"
    parametrization: Name = "sp"
    config: dict[str, Any] = field(default_factory=dict)
    micro_batch: int = MICRO_BATCH
    only: tuple[str, ...] = MODELS

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp


RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 3}
RECOMPUTE_BLOCK = {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 2}
RECOMPUTE_ATTENTION = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
SMOOTHED = {"label_smoothing": 0.1}
CHUNKED = {"chunked_cross_entropy": True}

RECOMPUTE_EXPERTS = {"recompute_granularity": "selective", "recompute_modules": ["moe", "core_attn"]}
# Gloo has no all-gather of unequal sizes, with which all-to-all puts the tensor-parallel parts of experts together.
ALLGATHER = {"moe_token_dispatcher_type": "allgather"}
GLOBAL = {"moe_router_load_balancing_type": "global_aux_loss"}

LAYOUTS = {
    "recompute": Layout(config=RECOMPUTE),
    "recompute_experts": Layout(config=RECOMPUTE_EXPERTS, only=EXPERTS),
    "recompute_block": Layout(config=RECOMPUTE_BLOCK),
    "recompute_attention": Layout(config=RECOMPUTE_ATTENTION),
    "dp2": Layout(dp=2),
    "dp2_overlap": Layout(dp=2, overlap=True),
    "tp2": Layout(tp=2, only=DENSE),  # with experts, Megatron wants sequence parallelism
    "stp2": Layout(tp=2, sp=True),
    "stp2_untied": Layout(tp=2, sp=True, tied=False),
    "pp2": Layout(pp=2),
    "pp2_vpp2": Layout(pp=2, vpp=2),
    "pp2_recompute": Layout(pp=2, config=RECOMPUTE),
    "pp4": Layout(pp=4),
    "pp4_untied": Layout(pp=4, tied=False),
    "pp4_by_hand": Layout(pp=4, cuts=(9, 11, 12)),  # one stage only passes on what it got
    "stp2_pp2": Layout(tp=2, pp=2, sp=True),
    "stp2_pp2_dp2": Layout(tp=2, pp=2, dp=2, sp=True),
    "stp2_smoothed": Layout(tp=2, sp=True, config=SMOOTHED),
    "chunked_loss": Layout(config=CHUNKED | SMOOTHED),
    "chunked_loss_tp2": Layout(tp=2, config=CHUNKED, only=DENSE),
    "chunked_loss_stp2_pp2": Layout(tp=2, pp=2, sp=True, config=CHUNKED | SMOOTHED),
    "chunked_loss_dp2_overlap": Layout(dp=2, overlap=True, tied=False, config=CHUNKED),
    "varlen_recompute": Layout(varlen=True, config=RECOMPUTE),
    "varlen_recompute_attention": Layout(varlen=True, config=RECOMPUTE_ATTENTION),
    "varlen_pp2_vpp2": Layout(pp=2, vpp=2, varlen=True),
    "varlen_stp2_pp2": Layout(tp=2, pp=2, sp=True, varlen=True),
    "pp2_bf16": Layout(pp=2, bf16=True, cuts=(11,)),
    "stp2_pp2_bf16": Layout(tp=2, pp=2, sp=True, bf16=True, cuts=(11,)),
    "pp4_uneven": Layout(pp=4, cuts=(9, 10, 11), only=EXPERTS),  # one stage has no experts
    "ep2": Layout(dp=2, ep=2, only=EXPERTS),
    "ep2_overlap": Layout(dp=2, ep=2, overlap=True, only=EXPERTS),
    "ep2_dp4": Layout(dp=4, ep=2, only=EXPERTS),
    "ep2_pp2": Layout(dp=2, ep=2, pp=2, only=EXPERTS),
    "ep2_stp2": Layout(dp=2, ep=2, tp=2, sp=True, config=ALLGATHER, only=EXPERTS),
    "ep2_stp2_etp1": Layout(tp=2, ep=2, etp=1, sp=True, only=EXPERTS),
    "dp2_global": Layout(dp=2, config=GLOBAL, only=EXPERTS),
    "ep2_stp2_global": Layout(dp=2, ep=2, etp=1, tp=2, sp=True, config=GLOBAL, only=EXPERTS),
    "mup_dp2_overlap": Layout(dp=2, overlap=True, parametrization="mup++", only=MUON),
    "mup_stp2_pp2": Layout(tp=2, pp=2, sp=True, parametrization="mup++", only=MUON),
    "mup_chunked_loss_pp2_vpp2": Layout(pp=2, vpp=2, parametrization="mup++", config=CHUNKED, only=MUON),
    "muon_dp2": Layout(dp=2, optimizer="muon", only=MUON),
    "muon_stp2_pp2": Layout(tp=2, pp=2, sp=True, optimizer="muon", only=MUON),
    "muonh_tp2": Layout(tp=2, optimizer="muonh", only=tuple(m for m in MUON if m in DENSE)),
    "muonh_stp2_pp2_dp2": Layout(tp=2, pp=2, dp=2, sp=True, optimizer="muonh", only=MUON),
    "muonh_stp2_pp2_untied": Layout(tp=2, pp=2, sp=True, tied=False, optimizer="muonh", only=MUON),
    "muonh_ep2_stp2": Layout(dp=2, ep=2, tp=2, sp=True, config=ALLGATHER, optimizer="muonh", only=EXPERTS),
}


def tiny(model: str, tied: bool = True) -> Architecture:
    """The tiny architecture of `model`, a family or one of `OWN`."""
    arch = build_architecture(model.split()[0], **TINY | OWN.get(model, {}), tied_embeddings=tied)
    return replace(arch, mamba2_head_dim=8, mamba2_state_size=8, gdn_head_dim=24)


def pattern_of(arch: Architecture, layout: Layout) -> str:
    """The layer pattern with the stages of `layout`."""
    if not layout.cuts:
        return split_by_compute(arch, layout.pp * layout.vpp, SEQUENCE_LENGTH)
    ends = zip((0, *layout.cuts), (*layout.cuts, len(arch.pattern)), strict=True)
    return PIPE.join(arch.pattern[start:end] for start, end in ends)


def reference_of(layout: Layout) -> str:
    """The single-process run, with the plain loss, that `layout` is compared with.

    The load of experts is balanced over a micro-batch on one data-parallel rank, so the micro-batches of the reference
    are as large; with the global loss, over the micro-batches of all ranks at a time, which together are one of the
    reference.
    """
    if layout.config == GLOBAL:
        return "single_global"
    if "label_smoothing" in layout.config:
        return "single_smoothed"
    if layout.bf16:
        return "single_bf16"
    if layout.varlen:
        return "single_varlen"
    if layout.parametrization != "sp":
        return "single_mup"
    single = "single" if layout.optimizer == "adam" else f"single_{layout.optimizer}"
    return single if layout.tied else f"{single}_untied"


REFERENCES = {
    "single": Layout(),
    "single_untied": Layout(tied=False),
    "single_bf16": Layout(bf16=True),
    "single_smoothed": Layout(config=SMOOTHED),
    "single_global": Layout(config=GLOBAL, micro_batch=2 * MICRO_BATCH, only=EXPERTS),
    "single_varlen": Layout(varlen=True),
    "single_mup": Layout(parametrization="mup++"),
    "single_muon": Layout(optimizer="muon"),
    "single_muonh": Layout(optimizer="muonh"),
    "single_muonh_untied": Layout(tied=False, optimizer="muonh"),
}
# How far roundings alone take each of them: see `compare.tolerance`.
# One draw may miss the tensors that are sums which all but cancel, such as the gradients of lambdas.
DRAWS = (1, 2, 3)
ROUNDED = {
    f"{name}_rounded{seed}": replace(layout, rounded=seed)
    for name, layout in REFERENCES.items()
    for seed in DRAWS
    if not layout.bf16
}

EVERYTHING = [(model, name) for name, layout in LAYOUTS.items() for model in layout.only]
# What continuous integration runs: every layout, and every model.
IN_EVERY_LAYOUT = ("sambay", "sambay_gqa4_moe")
FOR_EVERY_MODEL = ("recompute", "stp2_pp2", "varlen_pp2_vpp2", "muonh_stp2_pp2_untied")
SUBSET = [(model, name) for model, name in EVERYTHING if model in IN_EVERY_LAYOUT or name in FOR_EVERY_MODEL]


def with_references(cases: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """`cases`, and the single-process runs that they, and the first draw of roundings, are compared with."""
    runs = {(model, reference_of(LAYOUTS[name])) for model, name in cases}
    runs |= {(model, f"{name}_rounded{DRAWS[0]}") for model, name in runs if not REFERENCES[name].bf16}
    runs |= {(model, "single") for model, _ in cases}
    return sorted(runs) + cases
