"""The families: each is a layer pattern and a few numbers, as in the figure of arXiv 2507.06607."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from archscale_megatron.archs.architecture import Architecture


@dataclass(frozen=True)
class Family:
    """What the depth alone decides. `aspect_ratio` is hidden size / depth."""

    pattern: str
    aspect_ratio: int
    rope: bool
    window: int = 128
    depth_multiple: int = 1


def transformer(depth: int) -> Family:
    """Llama-like: full attention with RoPE everywhere."""
    return Family("*-" * depth, aspect_ratio=128, rope=True)


def transformerls(depth: int) -> Family:
    """Three sliding-window attentions and a full one in turn, with RoPE."""
    return Family("W-W-W-*-" * (depth // 4), aspect_ratio=128, rope=True, depth_multiple=4)


def samba(depth: int) -> Family:
    """Mamba-1 and sliding-window attention in turn, with RoPE."""
    return Family("m-W-" * (depth // 2), aspect_ratio=122, rope=True, window=2048, depth_multiple=2)


def sambay(depth: int) -> Family:
    """Samba; one Mamba that writes the memory, one full attention that writes the keys and values;
    then GMUs that read the memory and cross attentions that read the keys and values. No positions."""
    return Family(_half_samba(depth) + "U-X-" * (depth // 4 - 1), aspect_ratio=124, rope=False, depth_multiple=4)


def sambayoco(depth: int) -> Family:
    """SambaY with cross attentions in the place of the GMUs. No positions."""
    return Family(_half_samba(depth) + "X-" * (depth // 2 - 2), aspect_ratio=126, rope=False, depth_multiple=4)


def swayoco(depth: int) -> Family:
    """Sliding-window attention, a full attention that writes the keys and values (after RoPE), cross attention."""
    pattern = "W-" * (depth // 2 + 1) + "*-" + "X-" * (depth // 2 - 2)
    return Family(pattern, aspect_ratio=130, rope=True, depth_multiple=4)


def _half_samba(depth: int) -> str:
    """Half of the layers Samba's, then the Mamba and the full attention whose state later layers share."""
    return "m-W-" * (depth // 4) + "m-*-"


FAMILIES: dict[str, Callable[[int], Family]] = {
    f.__name__: f for f in (transformer, transformerls, samba, sambay, sambayoco, swayoco)
}


def build_architecture(
    family: str,
    depth: int,
    *,
    aspect_ratio: int | None = None,
    head_dim: int | None = None,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    local_window: int | None = None,
    rotary_base: int | None = None,
    vocab_size: int = 32000,
    tied_embeddings: bool = True,
) -> Architecture:
    """The architecture of `family` at `depth`; each override replaces one number of the family's.

    ArchScale's defaults: `depth` heads of size 128, a quarter as many key-value heads, MLP of four
    times the width, RoPE base 10,000.

    Raises:
        ValueError: unknown family, or a depth or an override that the family cannot have.
    """
    if family not in FAMILIES:
        raise ValueError(f"--train-model {family}: unknown family; known are {', '.join(sorted(FAMILIES))}")
    numbers = {
        "depth": depth,
        "aspect-ratio": aspect_ratio,
        "head-dim": head_dim,
        "num-heads": num_heads,
        "num-kv-heads": num_kv_heads,
        "local-window": local_window,
        "vocab-size": vocab_size,
    }
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value}: must be a positive integer")
    chosen = FAMILIES[family](depth)
    if depth % chosen.depth_multiple:
        below = depth - depth % chosen.depth_multiple
        legal = [d for d in (below, below + chosen.depth_multiple) if d]
        raise ValueError(
            f"--depth {depth}: the depth of {family} must be a multiple of {chosen.depth_multiple}; "
            f"the nearest: {', '.join(map(str, legal))}"
        )
    if rotary_base is not None and not chosen.rope:
        raise ValueError(f"--rotary-base {rotary_base}: {family} has no position embeddings; leave it out")
    if head_dim is not None and chosen.rope and head_dim % 2:
        raise ValueError(f"--head-dim {head_dim}: RoPE turns pairs of channels, so it must be even")
    hidden_size = (aspect_ratio or chosen.aspect_ratio) * depth
    heads = num_heads or depth
    return Architecture(
        family=family,
        depth=depth,
        pattern=chosen.pattern,
        hidden_size=hidden_size,
        ffn_hidden_size=4 * hidden_size,
        num_attention_heads=heads,
        num_query_groups=num_kv_heads or max(1, heads // 4),
        head_dim=head_dim or 128,
        window=local_window or chosen.window,
        rotary_base=(rotary_base or 10000) if chosen.rope else None,
        vocab_size=vocab_size,
        tied_embeddings=tied_embeddings,
    )
