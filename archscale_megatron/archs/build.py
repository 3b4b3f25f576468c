"""From a family, a depth and the user's overrides to an architecture, or to an error that says what is legal."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import replace
from typing import Any

from archscale_megatron.archs.architecture import MOE, WINDOW_ATTENTION, Architecture, Options
from archscale_megatron.archs.families import FAMILIES, Family

EXPERT_OPTIONS = ("sparsity", "top_k", "shared_expert", "sqrt_gate")
"""Those of `Options` that only families with experts have."""


def build_architecture(
    family: str,
    depth: int,
    *,
    aspect_ratio: int | None = None,
    hidden_size: int | None = None,
    ffn_hidden_size: int | None = None,
    norm_epsilon: float | None = None,
    head_dim: int | None = None,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    local_window: int | None = None,
    rope: bool | None = None,
    rotary_base: int | None = None,
    context_length: int = 4096,
    vocab_size: int | None = None,
    tied_embeddings: bool = True,
    **options: Any,
) -> Architecture:
    """The architecture of `family` at `depth`; each override that is not None replaces what the family says.

    ArchScale's defaults: `depth` heads of size 128, a quarter as many key-value heads, MLP of four
    times the width, RoPE base 10,000.

    Args:
        context_length: tokens of a training sequence; decides the window of sambayw and sambaywr alone.
        options: fields of `Options`.
    Raises:
        ValueError: unknown family, or a depth or an override that the family cannot have.
    """
    chosen = _family(family, depth)
    if rope is not None:
        chosen = replace(chosen, rope=rope)
    chosen = replace(chosen, **{name: value for name, value in options.items() if value is not None})
    numbers = {
        "depth": depth,
        "aspect-ratio": aspect_ratio,
        "hidden-size": hidden_size,
        "ffn-hidden-size": ffn_hidden_size,
        "head-dim": head_dim,
        "num-heads": num_heads,
        "num-kv-heads": num_kv_heads,
        "local-window": local_window,
        "vocab-size": vocab_size,
        "sparsity": chosen.sparsity,
        "top-k": chosen.top_k if MOE in chosen.pattern else None,
    }
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value}: must be a positive integer")
    if norm_epsilon is not None and not 0 < norm_epsilon < 1:
        raise ValueError(f"--norm-epsilon {norm_epsilon}: must be above 0 and below 1")
    if hidden_size and aspect_ratio and hidden_size != aspect_ratio * depth:
        raise ValueError(f"--hidden-size {hidden_size} contradicts --aspect-ratio {aspect_ratio}; leave one out")
    if rotary_base is not None and not chosen.rope:
        raise ValueError(f"--rotary-base {rotary_base}: {family} has no position embeddings; leave it out")
    if MOE not in chosen.pattern and (given := [name for name in EXPERT_OPTIONS if options.get(name) is not None]):
        known = ", ".join(name for name, f in FAMILIES.items() if MOE in f(8).pattern)
        raise ValueError(f"--{given[0].replace('_', '-')}: {family} has no experts; leave it out, or use {known}")
    if MOE in chosen.pattern and chosen.linear_bias:
        raise ValueError(f"--linear-bias: the experts of {family} have no biases; leave it out")
    if chosen.attention_sink and (
        chosen.differential_attention or chosen.half_window or WINDOW_ATTENTION in chosen.pattern
    ):
        raise ValueError(
            f"--attention-sink: a sink is for full attention; {family} has windows or differential attention; leave it "
            "out, or use transformersa"
        )

    hidden_size = hidden_size or (aspect_ratio or chosen.aspect_ratio) * depth
    heads, kv_heads = _heads(chosen, depth, num_heads, num_kv_heads)
    head_dim = head_dim or chosen.head_dim or hidden_size // heads
    if chosen.rope and head_dim % 2:
        raise ValueError(f"--head-dim {head_dim}: RoPE turns pairs of channels, so it must be even")
    try:
        return Architecture(
            family=family,
            depth=depth,
            pattern=chosen.pattern,
            hidden_size=hidden_size,
            ffn_hidden_size=ffn_hidden_size or 4 * hidden_size,
            num_attention_heads=heads,
            num_query_groups=kv_heads,
            head_dim=head_dim,
            window=local_window or chosen.window,
            full_window=context_length // 2 if chosen.half_window else None,
            rotary_base=(rotary_base or 10000) if chosen.rope else None,
            vocab_size=vocab_size or chosen.vocab_size,
            tied_embeddings=tied_embeddings,
            norm_epsilon=norm_epsilon or Architecture.norm_epsilon,
            **{field.name: getattr(chosen, field.name) for field in dataclasses.fields(Options)},
        )
    except ValueError as error:
        if num_heads or num_kv_heads or chosen.top_k:
            raise
        raise ValueError(
            f"{error}, or one of the depths {_legal_depths(family, chosen.differential_attention)}"
        ) from None


def _family(name: str, depth: int) -> Family:
    if name not in FAMILIES:
        close = difflib.get_close_matches(name, FAMILIES, n=4, cutoff=0.5)
        advice = f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(sorted(FAMILIES))}"
        raise ValueError(f"{name}: unknown family; {advice}")
    if depth < 1:
        raise ValueError(f"--depth {depth}: must be a positive integer")
    multiple = FAMILIES[name](depth).depth_multiple
    if depth % multiple:
        below = depth - depth % multiple
        legal = [d for d in (below, below + multiple) if d]
        raise ValueError(
            f"--depth {depth}: the depth of {name} must be a multiple of {multiple}; "
            f"the nearest: {', '.join(map(str, legal))}"
        )
    return FAMILIES[name](depth)


def _heads(
    chosen: Family, depth: int, num_heads: int | None = None, num_kv_heads: int | None = None
) -> tuple[int, int]:
    """Heads and key-value heads. A family's own number of the second goes with its own number of the first."""
    heads = num_heads or chosen.num_heads or depth
    own = chosen.num_kv_heads if num_heads is None else None
    return heads, num_kv_heads or own or max(1, heads // 4)


def _legal_depths(name: str, differential: bool) -> str:
    """Depths up to 32 that `name` can have without overrides of its numbers."""
    legal = []
    for depth in range(4, 33, 4):
        heads, kv_heads = _heads(FAMILIES[name](depth), depth)
        if heads % kv_heads == 0 and not (differential and kv_heads % 2):
            legal.append(str(depth))
    return ", ".join(legal)
