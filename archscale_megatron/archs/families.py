"""The families: each is a layer pattern and a few numbers, as in the figure of arXiv 2507.06607."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from archscale_megatron.archs.architecture import FULL_ATTENTION, MLP, MOE, Options


@dataclass(frozen=True, kw_only=True)
class Family(Options):
    """What the depth alone decides. `aspect_ratio` is hidden size / depth.

    `num_heads` is the depth if None, `num_kv_heads` a quarter of the heads, and `head_dim` 0 is hidden size / heads.
    `half_window`: full and cross attention see half of the context only.
    """

    pattern: str
    aspect_ratio: int
    rope: bool = True
    window: int = 128
    half_window: bool = False
    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int = 128
    vocab_size: int = 32000
    depth_multiple: int = 1


def transformer(depth: int) -> Family:
    """Llama-like: full attention with RoPE everywhere."""
    return Family(pattern="*-" * depth, aspect_ratio=128)


def transformer_mha(depth: int) -> Family:
    """As many key-value heads as heads."""
    return replace(transformer(depth), num_kv_heads=depth)


def transformer_gqa4(depth: int) -> Family:
    """Four key-value heads at every depth."""
    return replace(transformer(depth), num_kv_heads=4)


def transformer_gqa4_h2(depth: int) -> Family:
    """Twice as many heads as layers, four key-value heads."""
    return replace(transformer(depth), num_heads=2 * depth, num_kv_heads=4)


def transformer_gqa4_h2_moe(depth: int) -> Family:
    """`transformer_gqa4_h2` with experts in the place of the MLPs."""
    return _with_experts(transformer_gqa4_h2(depth))


def transformerls(depth: int) -> Family:
    """Three sliding-window attentions and a full one in turn, with RoPE."""
    return Family(pattern="W-W-W-*-" * (depth // 4), aspect_ratio=128, depth_multiple=4)


def transformersa(depth: int) -> Family:
    """Attention with a sink."""
    return replace(transformer(depth), attention_sink=True)


def transformerga(depth: int) -> Family:
    """Gated attention, four key-value heads."""
    return Family(pattern="*-" * depth, aspect_ratio=124, num_kv_heads=4, head_dim=0, attention_gate=True)


def mamba(depth: int) -> Family:
    """Mamba-1 and an MLP in every layer."""
    return Family(pattern="m-" * depth, aspect_ratio=116, rope=False, num_kv_heads=depth)


def samba(depth: int) -> Family:
    """Mamba-1 and sliding-window attention in turn, with RoPE."""
    return Family(pattern="m-W-" * (depth // 2), aspect_ratio=122, window=2048, depth_multiple=2)


def sambay(depth: int) -> Family:
    """Half of Samba, then GMUs that read its memory and cross attentions that share keys and values. No positions.

    Between the two a Mamba-1 writes the memory, and a full attention the keys and values.
    """
    return _decoder_hybrid_decoder("m-W-", "m", depth, aspect_ratio=124)


def sambayda(depth: int) -> Family:
    """SambaY with differential attention."""
    return replace(sambay(depth), differential_attention=True)


def sambayw(depth: int) -> Family:
    """SambaY whose full and cross attention see half of the context."""
    return replace(sambay(depth), half_window=True)


def sambaywr(depth: int) -> Family:
    """`sambayw` with RoPE."""
    return replace(sambayw(depth), rope=True)


def sambay_gqa4_moe(depth: int) -> Family:
    """SambaY with four key-value heads, and experts in the place of the MLPs."""
    return replace(_with_experts(sambay(depth)), num_kv_heads=4)


def sambay2(depth: int) -> Family:
    """SambaY on Mamba-2."""
    return _decoder_hybrid_decoder("M-W-", "M", depth, aspect_ratio=124)


def sgdny(depth: int) -> Family:
    """SambaY on gated delta nets."""
    return _decoder_hybrid_decoder("G-W-", "G", depth, aspect_ratio=126)


def mambay(depth: int) -> Family:
    """SambaY with Mamba-1 alone in the first half."""
    return _decoder_hybrid_decoder("m-m-", "m", depth, aspect_ratio=120)


def mambay2(depth: int) -> Family:
    """SambaY with Mamba-2 alone in the first half."""
    return _decoder_hybrid_decoder("M-M-", "M", depth, aspect_ratio=120)


def gdny(depth: int) -> Family:
    """SambaY with gated delta nets alone in the first half."""
    return _decoder_hybrid_decoder("G-G-", "G", depth, aspect_ratio=120)


def sambayattn(depth: int) -> Family:
    """SambaY whose memory is the full attention's output."""
    return replace(sambay(depth), aspect_ratio=126, memory_source=FULL_ATTENTION)


def sambayattnall(depth: int) -> Family:
    """`sambayattn` with GMUs in the place of the cross attentions."""
    family = sambayattn(depth)
    return replace(family, pattern=family.pattern.replace("X", "U"))


def sambaymlp(depth: int) -> Family:
    """SambaY whose memory is the up branch of the MLP behind the full attention."""
    return replace(sambay(depth), aspect_ratio=120, memory_source=MLP)


def sambayoco(depth: int) -> Family:
    """SambaY with cross attentions in the place of the GMUs. No positions."""
    family = _decoder_hybrid_decoder("m-W-", "m", depth, aspect_ratio=126)
    return replace(family, pattern=family.pattern.replace("U", "X"))


def swayoco(depth: int) -> Family:
    """Sliding-window attention, one full attention, then cross attentions to its keys and values, with RoPE."""
    pattern = "W-" * (depth // 2 + 1) + "*-" + "X-" * (depth // 2 - 2)
    return Family(pattern=pattern, aspect_ratio=130, depth_multiple=4)


def phi4miniflash(depth: int) -> Family:
    """Phi-4-mini-flash at depth 32: SambaY with differential attention, heads of 64, biases, LayerNorm."""
    heads = 5 * depth // 4
    return replace(
        sambayda(depth), aspect_ratio=80, num_heads=heads, num_kv_heads=heads // 2, head_dim=64, window=512,
        vocab_size=200064, normalization="LayerNorm", qkv_bias=True, attention_output_bias=True,
    )  # fmt: skip


def _decoder_hybrid_decoder(self_decoder: str, memory_writer: str, depth: int, aspect_ratio: int) -> Family:
    """Half of the layers the self-decoder's, then a writer of the memory and one of the keys and values, whose
    readers are the rest."""
    pattern = self_decoder * (depth // 4) + f"{memory_writer}-*-" + "U-X-" * (depth // 4 - 1)
    return Family(pattern=pattern, aspect_ratio=aspect_ratio, rope=False, depth_multiple=4)


def _with_experts(family: Family) -> Family:
    """8 of 64 experts, as in ArchScale's own runs; `--sparsity` and `--top-k` say otherwise."""
    return replace(family, pattern=family.pattern.replace(MLP, MOE), sparsity=8, top_k=8)


FAMILIES: dict[str, Callable[[int], Family]] = {
    f.__name__: f
    for f in (
        transformer, transformer_mha, transformer_gqa4, transformer_gqa4_h2, transformerls, transformersa,
        transformerga, mamba, samba, sambay, sambayda, sambayw, sambaywr, sambay2, sgdny, mambay, mambay2, gdny,
        sambayattn, sambayattnall, sambaymlp, sambayoco, swayoco, phi4miniflash,
        transformer_gqa4_h2_moe, sambay_gqa4_moe,
    )
}  # fmt: skip
