"""Named parallel layouts, and the tiny model of each family that they are compared on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from archscale_megatron.archs.architecture import PIPE, Architecture
from archscale_megatron.archs.build import build_architecture
from archscale_megatron.model.pipeline import split_by_compute

FAMILIES = ("transformer", "transformerls", "samba", "sambay", "sambayoco", "swayoco")
TINY = {"depth": 8, "aspect_ratio": 8, "head_dim": 8, "local_window": 7, "vocab_size": 96}
# Differential attention needs two key-value heads a rank. The second family has all options of attention and linears.
OPTIONS = {
    "attention_gate": True, "qk_norm": True, "qkv_bias": True, "attention_output_bias": True, "linear_bias": True,
}  # fmt: skip
ATTENTION_FAMILIES = ("transformersa", "transformerga", "sambayda", "phi4miniflash", "transformersa with options")
SEQUENCE_LENGTH = 32
GLOBAL_BATCH, MICRO_BATCH = 8, 2


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel groups. `overlap` hides data-parallel communication behind computation; `cuts` are the
    hybrid layers before which a stage starts (by compute if empty); `config` are further fields of the config."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    dp: int = 1
    sp: bool = False
    bf16: bool = False
    overlap: bool = False
    tied: bool = True
    cuts: tuple[int, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp


RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 3}
RECOMPUTE_BLOCK = {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 2}
RECOMPUTE_ATTENTION = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
SMOOTHED = {"label_smoothing": 0.1}
CHUNKED = {"chunked_cross_entropy": True}

LAYOUTS = {
    "recompute": Layout(config=RECOMPUTE),
    "recompute_block": Layout(config=RECOMPUTE_BLOCK),
    "recompute_attention": Layout(config=RECOMPUTE_ATTENTION),
    "dp2": Layout(dp=2),
    "dp2_overlap": Layout(dp=2, overlap=True),
    "tp2": Layout(tp=2),
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
    "chunked_loss_tp2": Layout(tp=2, config=CHUNKED),
    "chunked_loss_stp2_pp2": Layout(tp=2, pp=2, sp=True, config=CHUNKED | SMOOTHED),
    "chunked_loss_dp2_overlap": Layout(dp=2, overlap=True, tied=False, config=CHUNKED),
    "pp2_bf16": Layout(pp=2, bf16=True, cuts=(11,)),
    "stp2_pp2_bf16": Layout(tp=2, pp=2, sp=True, bf16=True, cuts=(11,)),
}


def tiny(family: str, tied: bool = True) -> Architecture:
    """The tiny model of `family`."""
    family, options = family.split()[0], OPTIONS if " " in family else {}
    more_heads = family in ("transformerga", "sambayda", "phi4miniflash")
    heads = {"num_heads": 8, "num_kv_heads": 4} if more_heads else {}
    return build_architecture(family, **TINY, **heads, **options, tied_embeddings=tied)


def pattern_of(arch: Architecture, layout: Layout) -> str:
    """The layer pattern with the stages of `layout`."""
    if not layout.cuts:
        return split_by_compute(arch, layout.pp * layout.vpp, SEQUENCE_LENGTH)
    ends = zip((0, *layout.cuts), (*layout.cuts, len(arch.pattern)), strict=True)
    return PIPE.join(arch.pattern[start:end] for start, end in ends)


def reference_of(layout: Layout) -> Layout:
    """The single-process run, with the plain loss, that `layout` is compared with."""
    config = {name: value for name, value in layout.config.items() if name in SMOOTHED}
    return Layout(bf16=layout.bf16, tied=layout.tied, config=config)


REFERENCES = {
    "single": Layout(),
    "single_untied": Layout(tied=False),
    "single_bf16": Layout(bf16=True),
    "single_smoothed": Layout(config=SMOOTHED),
}
