"""What an ArchScale model is: the config.json of an export. Copied beside the weights; needs transformers alone."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class ArchScaleConfig(PretrainedConfig):
    """A hybrid model: dimensions, and a pattern with one symbol a hybrid layer, `2 * depth` of them.

    An ArchScale layer is two hybrid layers, a mixer and an MLP. `m` Mamba-1, `M` Mamba-2, `G` gated delta net, `W`
    sliding-window attention, `*` full attention, `U` Gated Memory Unit, `X` cross attention, `-` MLP, `E` experts.

    Args:
        family: the name of the architecture.
        depth, hidden_size, vocab_size: layers, width of the residual stream, rows of the embedding.
        ffn_hidden_size: width of the MLP's gate, and of its up branch.
        num_attention_heads, num_query_groups, head_dim: queries, keys/values, and the size of each.
        window: tokens that sliding-window attention sees, the current one included.
        full_window: the same of full and cross attention; None is all.
        rotary_base: RoPE's base, or None for a model without position embeddings.
        max_position_embeddings: tokens of a training sequence; nothing in the model depends on it.
        norm_epsilon, conv_kernel: of the norms; taps of every causal convolution.
        state_size, expand: Mamba-1's d_state and d_inner / hidden_size.
        mamba2_state_size, mamba2_head_dim: Mamba-2's; its heads share one group of B and C.
        gdn_head_dim: size of a gated delta net's queries and keys; its values are twice as large.
        logit_multiplier, residual_multiplier, router_multiplier: of the last hidden states, of each layer's output
            before it is added, and of the router's logits.
        softmax_scale: of attention logits; None is 1 / sqrt(head_dim).
        differential_attention: differences of pairs of attention maps (arXiv 2410.05258).
        attention_gate: each head's output times the sigmoid of a gate (arXiv 2505.06708, one gate a head).
        attention_sink: a learned logit a head that takes attention from the tokens (arXiv 2309.17453).
        qk_norm: RMSNorm of each head's query and key in self-attention.
        qkv_bias, attention_output_bias, linear_bias: biases of the attention's projections, and of MLPs and GMUs.
        normalization: RMSNorm or LayerNorm, of the residual stream.
        memory_source: the kinds of layer that may write the GMU memory; the last before the first GMU does.
        sparsity, moe_top_k: a mixture of `sparsity * moe_top_k` experts, `moe_top_k` of them for each token, each
            1 / `moe_top_k` of an MLP. (In a config, transformers takes a `top_k` for that of sampling.)
        shared_expert: one of each token's experts is the same for all tokens.
        sqrt_gate: experts are weighed with the square roots of their probabilities (arXiv 2603.28743).
        initializer_range: standard deviation of new matrices.
    """

    model_type = "archscale"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "num_hidden_layers": "depth",
        "num_key_value_heads": "num_query_groups",
        "intermediate_size": "ffn_hidden_size",
    }

    def __init__(
        self,
        family: str = "sambay",
        depth: int = 8,
        pattern: str = "m-W-m-W-m-*-U-X-",
        hidden_size: int = 992,
        ffn_hidden_size: int = 3968,
        num_attention_heads: int = 8,
        num_query_groups: int = 2,
        head_dim: int = 128,
        window: int = 128,
        full_window: int | None = None,
        rotary_base: int | None = None,
        vocab_size: int = 32000,
        max_position_embeddings: int = 4096,
        norm_epsilon: float = 1e-5,
        conv_kernel: int = 4,
        state_size: int = 16,
        expand: int = 2,
        mamba2_state_size: int = 128,
        mamba2_head_dim: int = 64,
        gdn_head_dim: int = 256,
        logit_multiplier: float = 1.0,
        residual_multiplier: float = 1.0,
        router_multiplier: float = 1.0,
        softmax_scale: float | None = None,
        differential_attention: bool = False,
        attention_gate: bool = False,
        attention_sink: bool = False,
        qk_norm: bool = False,
        qkv_bias: bool = False,
        attention_output_bias: bool = False,
        linear_bias: bool = False,
        normalization: str = "RMSNorm",
        memory_source: str = "mMG",
        sparsity: int = 1,
        moe_top_k: int = 0,
        shared_expert: bool = False,
        sqrt_gate: bool = False,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        if len(pattern) != 2 * depth or set(pattern) - set("mMGW*UX-E"):
            raise ValueError(f"pattern {pattern!r}: give {2 * depth} symbols of mMGW*UX-E, two for each of the layers")
        for reader, writers in (("U", memory_source), ("X", "W*")):
            if reader in pattern and not set(pattern[: pattern.index(reader)]) & set(writers):
                raise ValueError(
                    f"pattern {pattern!r}: no layer of {writers} before the first {reader}, which reads it"
                )
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
        self.family = family
        self.depth = depth
        self.pattern = pattern
        self.hidden_size = hidden_size
        self.ffn_hidden_size = ffn_hidden_size
        self.num_attention_heads = num_attention_heads
        self.num_query_groups = num_query_groups
        self.head_dim = head_dim
        self.window = window
        self.full_window = full_window
        self.rotary_base = rotary_base
        self.vocab_size = vocab_size
        self.max_position_embeddings = max_position_embeddings
        self.norm_epsilon = norm_epsilon
        self.conv_kernel = conv_kernel
        self.state_size = state_size
        self.expand = expand
        self.mamba2_state_size = mamba2_state_size
        self.mamba2_head_dim = mamba2_head_dim
        self.gdn_head_dim = gdn_head_dim
        self.logit_multiplier = logit_multiplier
        self.residual_multiplier = residual_multiplier
        self.router_multiplier = router_multiplier
        self.softmax_scale = softmax_scale
        self.differential_attention = differential_attention
        self.attention_gate = attention_gate
        self.attention_sink = attention_sink
        self.qk_norm = qk_norm
        self.qkv_bias = qkv_bias
        self.attention_output_bias = attention_output_bias
        self.linear_bias = linear_bias
        self.normalization = normalization
        self.memory_source = memory_source
        self.sparsity = sparsity
        self.moe_top_k = moe_top_k
        self.shared_expert = shared_expert
        self.sqrt_gate = sqrt_gate
        self.initializer_range = initializer_range
        self.use_cache = use_cache

    def writer(self, reader: str) -> int | None:
        """The hybrid layer that writes what `reader` reads (`U` the memory, `X` the keys and values): the last before
        the first reader. None without a reader."""
        first = self.pattern.find(reader)
        writers = self.memory_source if reader == "U" else "W*"
        return None if first < 0 else max(i for i in range(first) if self.pattern[i] in writers)
