"""What layers of one forward pass hand to later layers besides the hidden states."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor


@dataclass
class SharedState:
    """Written once in a forward pass, read by all later GMU and cross-attention layers (arXiv 2507.06607).

    Every tensor holds this tensor-parallel rank's channels or heads, of the whole sequence, which is how
    its readers need it. Layers write into the object that they are given; activation recompute builds a
    new object for each pass (see `model.stack`).

    Attributes:
        memory: [s, b, d_memory / tp], the scan output of the memory-writing layer, in the compute dtype.
        key, value: [s, b, kv_heads / tp, head_dim] of the KV-writing attention (after RoPE, if any).
    """

    memory: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None


@dataclass(frozen=True)
class SequenceContext:
    """What every layer may know of the sequence.

    Attributes:
        rotary_pos_emb: [s, 1, 1, head_dim] RoPE angles, or None.
        document_starts: bool [s, b], True at the first token of each document, or None for one document.
    """

    rotary_pos_emb: Tensor | None = None
    document_starts: Tensor | None = None

    @cached_property
    def rotation(self) -> tuple[Tensor, Tensor] | None:
        """Cosine and sine of the RoPE angles, once for all layers."""
        return None if self.rotary_pos_emb is None else (self.rotary_pos_emb.cos(), self.rotary_pos_emb.sin())
