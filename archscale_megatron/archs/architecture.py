"""What a model is: its dimensions and its layer pattern. Plain data; imports neither torch nor Megatron."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

# A pattern holds one symbol a hybrid layer; an ArchScale layer is two of them, a mixer and an MLP.
# "-" is Megatron's own symbol, and so is "*".
MAMBA1, WINDOW_ATTENTION, FULL_ATTENTION, GMU, CROSS_ATTENTION, MLP = "m", "W", "*", "U", "X", "-"
SYMBOLS = {
    MAMBA1: "Mamba-1",
    WINDOW_ATTENTION: "sliding-window attention",
    FULL_ATTENTION: "full attention",
    GMU: "Gated Memory Unit: reads the memory",
    CROSS_ATTENTION: "cross attention: reads the shared keys and values",
    MLP: "SwiGLU MLP",
}
SELF_ATTENTION = WINDOW_ATTENTION + FULL_ATTENTION
PIPE = "|"

Payload = tuple[Literal["memory", "kv"], ...]


@dataclass(frozen=True)
class Architecture:
    """Dimensions and layers of one model.

    Attributes:
        family: name in the registry (`archs.families`).
        depth: number of ArchScale layers, each a mixer and an MLP.
        pattern: one symbol a hybrid layer, `2 * depth` of them (see `SYMBOLS`).
        hidden_size: width of the residual stream.
        ffn_hidden_size: width of the MLP's gate, and of its up branch.
        num_attention_heads, num_query_groups, head_dim: queries, keys/values, and the size of each.
        window: tokens that sliding-window attention sees, the current one included.
        rotary_base: RoPE's base, or None for a model without position embeddings.
        vocab_size: rows of the embedding, before padding.
        tied_embeddings: the output layer is the embedding.
        state_size, conv_kernel, expand: Mamba-1's d_state, d_conv and d_inner / hidden_size.
    """

    family: str
    depth: int
    pattern: str
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    window: int
    rotary_base: int | None
    vocab_size: int
    tied_embeddings: bool
    norm_epsilon: float = 1e-5
    state_size: int = 16
    conv_kernel: int = 4
    expand: int = 2

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"{self.family}, depth {self.depth}: {self.num_attention_heads} attention heads cannot share "
                f"{self.num_query_groups} key-value heads evenly; give --num-heads and --num-kv-heads so that the "
                "second divides the first, or take a depth that is a multiple of 4"
            )

    @property
    def d_inner(self) -> int:
        """Channels of the Mamba-1 scan, and of the memory that it writes."""
        return self.expand * self.hidden_size

    @property
    def dt_rank(self) -> int:
        """Rank of Mamba-1's step-size projection: ceil(w / 16)."""
        return math.ceil(self.hidden_size / 16)

    @property
    def query_size(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Channels of the keys; the values have as many."""
        return self.num_query_groups * self.head_dim

    @property
    def memory_writer(self) -> int | None:
        """Index of the hybrid layer that writes the GMU memory: the last Mamba before the first GMU."""
        return _last_before_first(self.pattern, MAMBA1, GMU)

    @property
    def kv_writer(self) -> int | None:
        """Index of the layer that writes the shared keys and values: the last self-attention before
        the first cross attention."""
        return _last_before_first(self.pattern, SELF_ATTENTION, CROSS_ATTENTION)

    def payload_after(self, layer: int) -> Payload:
        """What must cross a pipeline boundary behind hybrid layer `layer`, besides the hidden states:
        all that was written up to there and is still read later."""
        later = self.pattern[layer + 1 :]
        memory = self.memory_writer is not None and self.memory_writer <= layer and GMU in later
        kv = self.kv_writer is not None and self.kv_writer <= layer and CROSS_ATTENTION in later
        both: Payload = ("memory", "kv")
        return tuple(name for name, crosses in zip(both, (memory, kv), strict=True) if crosses)

    def payload_size(self, payload: Payload) -> int:
        """Channels of `payload`, over all tensor-parallel ranks."""
        return sum(self.d_inner if name == "memory" else 2 * self.kv_size for name in payload)

    def tensor_parallel_sizes(self) -> list[int]:
        """Legal tensor-parallel sizes: those that divide the key-value heads (and so the query heads),
        the MLP, and where there is one, the Mamba channels."""
        sizes = range(1, self.num_query_groups + 1)
        divided = [self.num_query_groups, self.ffn_hidden_size]
        if MAMBA1 in self.pattern:
            divided.append(self.d_inner)
        return [size for size in sizes if all(n % size == 0 for n in divided)]


def _last_before_first(pattern: str, writers: str, reader: str) -> int | None:
    first = pattern.find(reader)
    return None if first < 0 else max(i for i in range(first) if pattern[i] in writers)
