"""What a model is: its dimensions and its layer pattern. Plain data; imports neither torch nor Megatron."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

# A pattern holds one symbol a hybrid layer; an ArchScale layer is two of them, a mixer and an MLP.
# "M", "G", "*", "-" and "E" are Megatron's own symbols.
MAMBA1, MAMBA2, GATED_DELTA_NET = "m", "M", "G"
WINDOW_ATTENTION, FULL_ATTENTION, CROSS_ATTENTION = "W", "*", "X"
GMU, MLP, MOE = "U", "-", "E"
SYMBOLS = {
    MAMBA1: "Mamba-1",
    MAMBA2: "Mamba-2",
    GATED_DELTA_NET: "gated delta net",
    WINDOW_ATTENTION: "sliding-window attention",
    FULL_ATTENTION: "full attention",
    GMU: "Gated Memory Unit: reads the memory",
    CROSS_ATTENTION: "cross attention: reads the shared keys and values",
    MLP: "SwiGLU MLP",
    MOE: "mixture of SwiGLU experts",
}
RECURRENT = MAMBA1 + MAMBA2 + GATED_DELTA_NET
SELF_ATTENTION = WINDOW_ATTENTION + FULL_ATTENTION
ATTENTION = SELF_ATTENTION + CROSS_ATTENTION
PIPE = "|"

Shared = Literal["memory", "kv"]
Payload = tuple[Shared, ...]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How the layers of a model are made, where families and users have a choice.

    Attributes:
        differential_attention: differences of pairs of attention maps (arXiv 2410.05258).
        attention_gate: each head's output times the sigmoid of a gate (arXiv 2505.06708, one gate a head).
        attention_sink: a learned logit a head that takes attention from the tokens (arXiv 2309.17453).
        qk_norm: RMSNorm of each head's query and key in self-attention.
        qkv_bias, attention_output_bias: biases of the attention's projections.
        linear_bias: biases of the projections of MLPs and GMUs.
        normalization: of the residual stream before each mixer, and of the last hidden states.
        memory_source: the kinds of layer that may write the GMU memory; the last before the first GMU does.
        sparsity, top_k: a mixture of `sparsity * top_k` experts, `top_k` of them for each token; each expert is
            1 / `top_k` of an MLP. `top_k` 0 is a plain MLP.
        shared_expert: one of each token's `top_k` experts is the same for all tokens.
        sqrt_gate: experts are weighed with the square roots of their probabilities (arXiv 2603.28743).
    """

    differential_attention: bool = False
    attention_gate: bool = False
    attention_sink: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    attention_output_bias: bool = False
    linear_bias: bool = False
    normalization: str = "RMSNorm"
    memory_source: str = RECURRENT
    sparsity: int = 1
    top_k: int = 0
    shared_expert: bool = False
    sqrt_gate: bool = False


@dataclass(frozen=True, kw_only=True)
class Architecture(Options):
    """Dimensions and layers of one model.

    Attributes:
        family: name in the registry (`archs.families`).
        depth: number of ArchScale layers, each a mixer and an MLP.
        pattern: one symbol a hybrid layer, `2 * depth` of them (see `SYMBOLS`).
        hidden_size: width of the residual stream.
        ffn_hidden_size: width of the MLP's gate, and of its up branch.
        num_attention_heads, num_query_groups, head_dim: queries, keys/values, and the size of each.
        window: tokens that sliding-window attention sees, the current one included.
        full_window: the same of full and cross attention; None is all.
        rotary_base: RoPE's base, or None for a model without position embeddings.
        vocab_size: rows of the embedding, before padding.
        tied_embeddings: the output layer is the embedding.
        conv_kernel: taps of every causal convolution.
        state_size, expand: Mamba-1's d_state and d_inner / hidden_size.
        mamba2_state_size, mamba2_head_dim: Mamba-2's; its heads share one group of B and C.
        gdn_head_dim: size of a gated delta net's queries and keys; its values are twice as large.
        logit_multiplier, residual_multiplier, router_multiplier: of the last hidden states, of each layer's output
            before it is added, and of the router's logits (`mup.rules`).
        softmax_scale: of attention logits; None is 1 / sqrt(head_dim).
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
    full_window: int | None = None
    rotary_base: int | None
    vocab_size: int
    tied_embeddings: bool
    norm_epsilon: float = 1e-5
    conv_kernel: int = 4
    state_size: int = 16
    expand: int = 2
    mamba2_state_size: int = 128
    mamba2_head_dim: int = 64
    gdn_head_dim: int = 256
    logit_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    router_multiplier: float = 1.0
    softmax_scale: float | None = None

    def __post_init__(self) -> None:
        heads, kv_heads = self.num_attention_heads, self.num_query_groups
        model = f"{self.family}, depth {self.depth}"
        if heads % kv_heads:
            raise ValueError(
                f"{model}: {heads} attention heads cannot share {kv_heads} key-value heads evenly; give --num-heads "
                "and --num-kv-heads so that the second divides the first"
            )
        if self.differential_attention and kv_heads % 2:
            raise ValueError(
                f"{model}: differential attention pairs key-value heads, and {kv_heads} is odd; give an even "
                "--num-kv-heads"
            )
        if self.top_k and self.experts_per_token < 2:
            raise ValueError(
                f"{model}: --top-k {self.top_k} routes a token to {self.experts_per_token} experts; the weight of a "
                f"single one is always 1 and teaches the router nothing: give --top-k {2 + self.shared_expert} or more"
            )
        if self.top_k and self.ffn_hidden_size % self.top_k:
            raise ValueError(
                f"{model}: {self.top_k} experts cannot share {self.ffn_hidden_size} MLP channels; "
                f"give a --top-k that divides them"
            )

    @property
    def d_inner(self) -> int:
        """Channels of the Mamba-1 scan."""
        return self.expand * self.hidden_size

    @property
    def dt_rank(self) -> int:
        """Rank of Mamba-1's step-size projection: ceil(w / 16)."""
        return math.ceil(self.hidden_size / 16)

    @property
    def mamba2_heads(self) -> int:
        """Heads of Mamba-2: enough for twice the width, in multiples of 8."""
        return 8 * math.ceil(2 * self.hidden_size / self.mamba2_head_dim / 8)

    @property
    def mamba2_d_inner(self) -> int:
        """Channels of the Mamba-2 scan."""
        return self.mamba2_heads * self.mamba2_head_dim

    @property
    def gdn_heads(self) -> int:
        """Heads of a gated delta net: enough for three quarters of the width."""
        return math.ceil(3 * self.hidden_size // 4 / self.gdn_head_dim)

    @property
    def gdn_key_size(self) -> int:
        """Channels of a gated delta net's keys; its queries have as many, its values twice as many."""
        return self.gdn_heads * self.gdn_head_dim

    @property
    def query_size(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Channels of the keys; the values have as many."""
        return self.num_query_groups * self.head_dim

    @property
    def num_experts(self) -> int:
        """Experts that are routed to: without the shared one."""
        return self.sparsity * self.top_k - self.shared_expert

    @property
    def experts_per_token(self) -> int:
        """Experts that a token is routed to."""
        return self.top_k - self.shared_expert

    @property
    def expert_ffn_size(self) -> int:
        """`ffn_hidden_size` of one expert."""
        return self.ffn_hidden_size // self.top_k

    @property
    def memory_writer(self) -> int | None:
        """Index of the hybrid layer that writes the GMU memory: the last of `memory_source` before the first GMU."""
        return _last_before_first(self.pattern, self.memory_source, GMU)

    @property
    def kv_writer(self) -> int | None:
        """Index of the layer that writes the shared keys and values: the last self-attention before
        the first cross attention."""
        return _last_before_first(self.pattern, SELF_ATTENTION, CROSS_ATTENTION)

    def writes(self, layer: int) -> Payload:
        """What hybrid layer `layer` writes into the shared state."""
        writers: dict[Shared, int | None] = {"memory": self.memory_writer, "kv": self.kv_writer}
        return tuple(name for name, writer in writers.items() if writer == layer)

    @property
    def memory_size(self) -> int:
        """Channels of the GMU memory; 0 without one."""
        if self.memory_writer is None:
            return 0
        return {
            MAMBA1: self.d_inner,
            MAMBA2: self.mamba2_d_inner,
            GATED_DELTA_NET: 2 * self.gdn_key_size,
            WINDOW_ATTENTION: self.query_size,
            FULL_ATTENTION: self.query_size,
            MLP: self.ffn_hidden_size,
        }[self.pattern[self.memory_writer]]

    @property
    def normalizes_memory(self) -> bool:
        """Whether a GMU norms its gated memory: that of a scan whose own output is normed."""
        return self.memory_writer is not None and self.pattern[self.memory_writer] in (MAMBA2, GATED_DELTA_NET)

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
        return sum(self.memory_size if name == "memory" else 2 * self.kv_size for name in payload)

    def split_over_ranks(self) -> dict[str, int]:
        """Name and number of what tensor parallelism splits. Megatron wants the key-value heads to be among
        them even without attention."""
        pairs = self.differential_attention
        numbers = {"pairs of key-value heads" if pairs else "key-value heads": self.num_query_groups // (1 + pairs)}
        by_symbol = {
            MAMBA1: {"Mamba channels": self.d_inner},
            MAMBA2: {"Mamba-2 heads": self.mamba2_heads, "Mamba-2 state channels": self.mamba2_state_size},
            GATED_DELTA_NET: {"gated delta net heads": self.gdn_heads},
            MLP: {"MLP channels": self.ffn_hidden_size},
            MOE: {"expert channels": self.expert_ffn_size} if self.top_k else {},
        }
        for symbol, more in by_symbol.items():
            numbers |= more if symbol in self.pattern else {}
        return numbers

    def tensor_parallel_sizes(self) -> list[int]:
        """Legal tensor-parallel sizes: those that divide all that is split."""
        numbers = self.split_over_ranks().values()
        return [size for size in range(1, min(numbers) + 1) if all(n % size == 0 for n in numbers)]


def _last_before_first(pattern: str, writers: str, reader: str) -> int | None:
    first = pattern.find(reader)
    return None if first < 0 else max(i for i in range(first) if pattern[i] in writers)
