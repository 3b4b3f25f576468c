"""Whole models in plain torch: loops, dense masks, whatever precision the parameters have.

Written from the formulas (SambaY arXiv 2507.06607, Mamba arXiv 2312.00752, YOCO arXiv 2405.05254, RoPE arXiv
2104.09864, differential attention arXiv 2410.05258, attention sinks arXiv 2309.17453) and sharing no code with the
package, so that tests can hold the package against it. Only the names and layouts of the parameters are the package's.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.reference_scans import gated_delta_net, mamba1, mamba2, silu

SCANS = {"mambay2": mamba2, "sambay2": mamba2, "gdny": gated_delta_net, "sgdny": gated_delta_net}
"""What "mamba" is in a family, if not Mamba-1."""

MISTAKES = {
    "transformer": (
        "gate and up swapped", "heads interleaved over key-value heads", "norm epsilon 1e-4", "RoPE interleaved",
    ),
    "samba": (
        "gate and up swapped", "heads interleaved over key-value heads", "norm epsilon 1e-4", "RoPE interleaved",
        "window one too small", "window one too large", "x and z swapped", "B and C swapped", "conv shifted by one",
        "no step size bias",
    ),
    "sambay": (
        "gate and up swapped", "heads interleaved over key-value heads", "norm epsilon 1e-4", "RoPE added",
        "window one too small", "window one too large", "x and z swapped", "B and C swapped", "conv shifted by one",
        "no step size bias", "memory after the gate", "memory without D x", "memory of the wrong layer",
        "keys and values of the wrong layer",
    ),
    "transformerls": ("window one too small", "window one too large", "RoPE interleaved"),
    "sambayoco": ("keys and values of the wrong layer", "RoPE added", "window one too large"),
    "swayoco": ("keys and values of the wrong layer", "RoPE interleaved", "window one too small"),
    "transformer_mha": ("RoPE interleaved",),
    "transformer_gqa4": ("heads interleaved over key-value heads",),
    "transformer_gqa4_h2": ("heads interleaved over key-value heads",),
    "mamba": ("gate and up swapped", "x and z swapped", "B and C swapped", "conv shifted by one"),
    "sambayw": ("full window one too small", "full window one too large", "window one too large", "RoPE added"),
    "sambaywr": ("full window one too small", "full window one too large", "RoPE interleaved"),
    "mambay": ("memory of the wrong layer", "memory after the gate", "memory without D x"),
    "sambayattn": ("memory of the wrong layer", "window one too large", "RoPE added"),
    "sambayattnall": ("memory of the wrong layer", "window one too large", "RoPE added"),
    "sambaymlp": ("memory of the wrong layer", "memory is the gate", "keys and values of the wrong layer"),
    "sambay2": (
        "memory of the wrong layer", "memory after the norm", "memory without D x", "B and C swapped",
        "norm before gate", "z and x swapped", "gated memory not normed", "no step size bias",
    ),
    "mambay2": ("memory of the wrong layer", "gated memory not normed"),
    "sgdny": (
        "memory of the wrong layer", "memory after the norm", "beta at most 1", "queries and keys swapped",
        "keys not normed", "norm before gate", "norm of each head", "decay after the update", "no step size bias",
    ),
    "gdny": ("memory of the wrong layer", "gated memory not normed"),
    "transformersa": ("no sink", "sink of the next head"),
    "transformerga": ("gate of the next head", "gate without the sigmoid", "gate of the queries"),
    "sambayda": (
        "pairs of distant queries", "pairs of distant keys", "pairs of distant values", "lambda of the next layer",
        "lambda of the hybrid layer", "no 1 - lambda_init", "no second exponential", "pairs not normed",
        "heads of a pair mixed", "window one too small", "keys and values of the wrong layer",
    ),
    "phi4miniflash": (
        "pairs of distant queries", "lambda of the next layer", "no bias of linear_qkv", "no bias of linear_q",
        "no bias of linear_proj", "norms without bias", "norms without mean",
    ),
    "transformer with options": (
        "queries not normed", "keys not normed", "norm after RoPE", "no bias of linear_gate", "no bias of linear_fc1",
        "no bias of linear_fc2", "no bias of linear_proj", "no sink", "gate of the next head",
    ),
    "sambayattn with options": (
        "queries not normed", "cross queries normed", "no bias of in_proj", "no bias of out_proj",
        "pairs of distant values", "gate of the next head", "memory before the attention's gate",
    ),
    "sambay with multipliers": (
        "no multiplier of logits", "no multiplier of mixers", "no multiplier of MLPs", "no multiplier of the softmax",
    ),
    "sambayda with multipliers": ("no multiplier of mixers", "no multiplier of the softmax"),
    "transformersa with multipliers": ("no multiplier of logits", "no multiplier of the softmax"),
    "sambay_gqa4_moe with multipliers": ("no multiplier of MLPs", "no multiplier of the router"),
    "transformer_gqa4_h2_moe": ("gate and up swapped", "softmax before top-k", "one expert too few", "weights squared"),
    "sambay_gqa4_moe": ("softmax before top-k", "weights squared", "shared expert not scaled", "no shared expert"),
}  # fmt: skip
"""Model -> single mistakes that its `Reference` can be told to make."""


@dataclass(frozen=True)
class Reference:
    """One model; windows count the current token, `rotary_base` None is no position embeddings.

    Biases, sinks, gates, norms of heads, and differential attention are there where their parameters are.
    """

    family: str
    depth: int
    num_heads: int
    num_kv_heads: int
    window: int
    full_window: int | None
    rotary_base: float | None
    mistake: str | None = None
    experts_per_token: int = 0
    sqrt_gate: bool = False
    logit_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    router_multiplier: float = 1.0
    softmax_scale: float | None = None

    def mixers(self) -> list[str]:
        """The mixer of each layer."""
        half, kinds = self.depth // 2, []
        for i in range(self.depth):
            even = i % 2 == 0
            if self.family == "transformerls":
                kinds.append("full" if i % 4 == 3 else "window")
            elif self.family.startswith("transformer"):
                kinds.append("full")
            elif self.family == "swayoco" and i <= half:
                kinds.append("window")
            elif self.family == "mamba" or (self.family in ("mambay", "mambay2", "gdny") and i < half):
                kinds.append("mamba")
            elif self.family == "samba" or i < half:
                kinds.append("mamba" if even else "window")
            elif i <= half + 1:
                kinds.append("mamba" if even else "full")
            elif self.family == "sambayattnall":
                kinds.append("gmu")
            else:
                kinds.append("gmu" if even and self.family not in ("sambayoco", "swayoco") else "cross")
        return kinds

    def logits(self, parameters: dict[str, Tensor], tokens: Tensor) -> Tensor:
        """tokens [b, s] -> [b, s, vocabulary]."""
        embedding = parameters["embedding.word_embeddings.weight"]
        kinds = self.mixers()
        memories: dict[tuple[str, int], Tensor] = {}  # what of which layer -> [b, s, channels]
        shared: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> keys and values, [b, s, kv heads, head_dim]
        source = {"sambayattn": "attention", "sambayattnall": "attention", "sambaymlp": "up"}.get(self.family, "mamba")
        memory_layer, kv_layer = self.depth // 2 + (source != "mamba"), self.depth // 2 + 1
        if self.mistake == "memory of the wrong layer":
            memory_layer -= 2
        if self.mistake == "memory is the gate":
            source = "gate"
        if self.mistake == "keys and values of the wrong layer":
            kv_layer -= 2

        x = embedding[tokens]
        for i, kind in enumerate(kinds):
            p = _layer(parameters, 2 * i)
            u = self._norm(x, p, "norm")
            if kind == "mamba":
                out, memories["mamba", i] = SCANS.get(self.family, mamba1)(u, p, self.mistake)
            elif kind == "gmu":
                gated = silu(self._linear(u, p, "in_proj")) * memories[source, memory_layer]
                if self.family in SCANS and self.mistake != "gated memory not normed":
                    gated = self._norm(gated, p, "mixer.norm")
                out = self._linear(gated, p, "out_proj")
            else:
                if kind == "cross":
                    query = self._linear(u, p, "linear_q").unflatten(-1, (self.num_heads, -1))
                    if self.mistake == "cross queries normed":
                        query = self._norm(query, {"weight": torch.ones_like(query[0, 0, 0])}, "")
                    query, (key, value) = self._rotate(query), shared[kv_layer]
                else:
                    query, key, value = self._query_key_value(self._linear(u, p, "linear_qkv"))
                    query, key = self._normed_and_rotated(query, key, p)
                    shared[i] = key, value
                mask = self._mask(tokens.shape[1], kind)
                memories["attention", i], out = self._gated_attention(u, query, key, value, mask, p, i)
                out = self._linear(out, p, "linear_proj")
            mixers, mlps = self._multipliers("mixers", "MLPs", of=self.residual_multiplier)
            x = x + mixers * out
            p = _layer(parameters, 2 * i + 1)
            out, memories["gate", i], memories["up", i] = self._mlp(self._norm(x, p, "norm"), p)
            x = x + mlps * out
        x = self._norm(x, parameters, "decoder.final_norm")
        (multiplier,) = self._multipliers("logits", of=self.logit_multiplier)
        return multiplier * (x @ parameters.get("output_layer.weight", embedding).T)

    def _multipliers(self, *names: str, of: float) -> list[float]:
        return [1.0 if self.mistake == f"no multiplier of {name}" else of for name in names]

    def _norm(self, x: Tensor, p: dict[str, Tensor], name: str) -> Tensor:
        """LayerNorm where it has a bias, else RMSNorm."""
        epsilon = 1e-4 if self.mistake == "norm epsilon 1e-4" else 1e-5
        weight, bias = (p.get(f"{name}.{what}".lstrip(".")) for what in ("weight", "bias"))
        if bias is not None and self.mistake != "norms without mean":
            x = x - x.mean(-1, keepdim=True)
        x = x / torch.sqrt((x * x).mean(-1, keepdim=True) + epsilon) * weight
        return x if bias is None or self.mistake == "norms without bias" else x + bias

    def _linear(self, x: Tensor, p: dict[str, Tensor], name: str) -> Tensor:
        x, bias = x @ p[f"mixer.{name}.weight"].T, p.get(f"mixer.{name}.bias")
        return x if bias is None or self.mistake == f"no bias of {name}" else x + bias

    def _mlp(self, x: Tensor, p: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The output, the gate before silu, and the up branch; of experts, the output thrice."""
        if "mixer.router.weight" in p:
            (multiplier,) = self._multipliers("the router", of=self.router_multiplier)
            p = p | {"mixer.router.weight": multiplier * p["mixer.router.weight"]}
            output = experts(x, p, self.experts_per_token, self.sqrt_gate, self.mistake)[0]
            return output, output, output
        gate, up = self._linear(x, p, "linear_fc1").chunk(2, -1)
        if self.mistake == "gate and up swapped":
            gate, up = up, gate
        return self._linear(silu(gate) * up, p, "linear_fc2"), gate, up

    def _query_key_value(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The channels of `x`, for each key-value head: its queries' heads, its key, its value."""
        per_group = self.num_heads // self.num_kv_heads
        heads = x.unflatten(-1, (self.num_kv_heads * (per_group + 2), -1))
        query, key, value = [], [], []
        for group in range(self.num_kv_heads):
            first = group * (per_group + 2)
            query += [heads[:, :, first + j] for j in range(per_group)]
            key.append(heads[:, :, first + per_group])
            value.append(heads[:, :, first + per_group + 1])
        return torch.stack(query, 2), torch.stack(key, 2), torch.stack(value, 2)

    def _normed_and_rotated(self, query: Tensor, key: Tensor, p: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        if "mixer.q_layernorm.weight" not in p:
            return self._rotate(query), self._rotate(key)
        if self.mistake == "norm after RoPE":
            query, key = self._rotate(query), self._rotate(key)
        if self.mistake != "queries not normed":
            query = self._norm(query, p, "mixer.q_layernorm")
        if self.mistake != "keys not normed":
            key = self._norm(key, p, "mixer.k_layernorm")
        return (query, key) if self.mistake == "norm after RoPE" else (self._rotate(query), self._rotate(key))

    def _rotate(self, x: Tensor) -> Tensor:
        """x [b, s, heads, d]: channels j and j + d / 2 turn by the angle position * base^(-2 j / d)."""
        base = 10000.0 if self.mistake == "RoPE added" else self.rotary_base
        if base is None:
            return x
        s, d = x.shape[1], x.shape[-1]
        angle = torch.tensor([[t * base ** (-2 * j / d) for j in range(d // 2)] for t in range(s)], dtype=x.dtype)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        if self.mistake == "RoPE interleaved":
            a, b = x[..., 0::2], x[..., 1::2]
            return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
        a, b = x[..., : d // 2], x[..., d // 2 :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def _mask(self, s: int, kind: str) -> Tensor:
        """bool [s, s]: may query t see key u?"""
        name, window = ("window", self.window) if kind == "window" else ("full window", self.full_window or s)
        window += {f"{name} one too small": -1, f"{name} one too large": 1}.get(self.mistake or "", 0)
        return torch.tensor([[0 <= t - u < window for u in range(s)] for t in range(s)])

    def _gated_attention(
        self, u: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, p: dict[str, Tensor], layer: int
    ) -> tuple[Tensor, Tensor]:
        """The memory, and what is projected: u [b, s, w], query, key and value as below -> [b, s, heads * d] twice."""
        gate: Tensor | float = 1.0
        if "mixer.linear_gate.weight" in p:
            gate = self._linear(u, p, "linear_gate")[..., None]
            gate = gate if self.mistake == "gate without the sigmoid" else torch.sigmoid(gate)
            if self.mistake == "gate of the next head":
                gate = gate.roll(-1, 2)
            if self.mistake == "gate of the queries":
                query, gate = query * gate, 1.0
        if "mixer.core_attention.lambda_q1" in p:
            out = self._differential_attention(query, key, value, mask, p, layer)
        else:
            out = self._attention(query, key, value, mask, p.get("mixer.core_attention.sink"))
        memory = out if self.mistake == "memory before the attention's gate" else out * gate
        return memory.flatten(2), (out * gate).flatten(2)

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, sink: Tensor | None = None) -> Tensor:
        """query [b, s, heads, d], key and value [b, s, kv heads, d] -> [b, s, heads, d]."""
        out = []
        for head in range(self.num_heads):
            group = head // (self.num_heads // self.num_kv_heads)
            if self.mistake == "heads interleaved over key-value heads":
                group = head % self.num_kv_heads
            logit = None
            if sink is not None and self.mistake != "no sink":
                logit = sink[(head + 1) % self.num_heads if self.mistake == "sink of the next head" else head]
            out.append(self._weights(query[:, :, head], key[:, :, group], mask, logit) @ value[:, :, group])
        return torch.stack(out, 2)

    def _weights(self, query: Tensor, key: Tensor, mask: Tensor, sink: Tensor | None = None) -> Tensor:
        """One head's attention map: query and key [b, s, d] -> [b, s, s]; the sink is one more logit of each query."""
        scale = 1 / math.sqrt(query.shape[-1])
        if self.softmax_scale is not None and self.mistake != "no multiplier of the softmax":
            scale = self.softmax_scale
        scores = (scale * (query @ key.mT)).masked_fill(~mask, -math.inf)
        if sink is None:
            return scores.softmax(-1)
        return torch.cat([sink.expand(*scores.shape[:-1], 1), scores], -1).softmax(-1)[..., 1:]

    def _differential_attention(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, p: dict[str, Tensor], layer: int
    ) -> Tensor:
        """As `_attention`, of pairs of heads (arXiv 2410.05258); `layer` counts from 0."""
        p = {name.removeprefix("mixer.core_attention."): values for name, values in p.items()}
        wrong = {"lambda of the next layer": layer + 1, "lambda of the hybrid layer": 2 * layer}
        index = wrong.get(self.mistake or "", layer)
        start = 0.8 - 0.6 * math.exp(-0.3 * index)
        factor = torch.exp((p["lambda_q1"] * p["lambda_k1"]).sum()) + start
        if self.mistake != "no second exponential":
            factor = factor - torch.exp((p["lambda_q2"] * p["lambda_k2"]).sum())

        def pair(heads: Tensor, i: int, name: str) -> tuple[Tensor, Tensor]:
            if self.mistake == f"pairs of distant {name}":
                return heads[:, :, i], heads[:, :, i + heads.shape[2] // 2]
            return heads[:, :, 2 * i], heads[:, :, 2 * i + 1]

        out = []
        for i in range(self.num_heads // 2):
            group = i // (self.num_heads // self.num_kv_heads)
            (q1, q2), (k1, k2) = pair(query, i, "queries"), pair(key, group, "keys")
            v = torch.cat(pair(value, group, "values"), -1)
            y = self._weights(q1, k1, mask) @ v - factor * (self._weights(q2, k2, mask) @ v)
            if self.mistake != "pairs not normed":
                y = self._norm(y, p, "sub_norm")
            if self.mistake != "no 1 - lambda_init":
                y = y * (1 - start)
            out += [y[..., 0::2], y[..., 1::2]] if self.mistake == "heads of a pair mixed" else y.chunk(2, -1)
        return torch.stack(out, 2)


def swiglu(x: Tensor, p: dict[str, Tensor], prefix: str, mistake: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The output, the gate before silu, and the up branch."""
    gate, up = (x @ half.T for half in p[f"{prefix}linear_fc1.weight"].chunk(2))
    if mistake == "gate and up swapped":
        gate, up = up, gate
    return (silu(gate) * up) @ p[f"{prefix}linear_fc2.weight"].T, gate, up


def experts(
    x: Tensor, p: dict[str, Tensor], per_token: int, sqrt_gate: bool, mistake: str | None = None
) -> tuple[Tensor, Tensor]:
    """x [..., w] -> the output of routed and shared experts [..., w], and the load-balancing loss, of coefficient 1.

    Token by token (Shazeer et al. arXiv 1701.06538; Switch arXiv 2101.03961; SqrtGate arXiv 2603.28743).
    """
    router = p["mixer.router.weight"]
    number, outputs = len(router), []
    probability, chosen = torch.zeros_like(router[:, 0]), [0] * number
    for token in x.reshape(-1, x.shape[-1]):
        logits = router @ token
        probability = probability + logits.exp() / logits.exp().sum()
        best = sorted(range(number), key=lambda i: -logits[i].item())[:per_token]
        for i in best:
            chosen[i] += 1
        if mistake == "one expert too few":
            best = best[:-1]
        normalizer = logits.exp().sum() if mistake == "softmax before top-k" else sum(logits[i].exp() for i in best)
        output = torch.zeros_like(token)
        for i in best:
            weight = logits[i].exp() / normalizer
            if mistake == "weights squared":
                weight = weight * weight
            if sqrt_gate:
                weight = weight.sqrt()
            output = output + weight * swiglu(token, p, f"mixer.experts.local_experts.{i}.", mistake)[0]
        if "mixer.shared_experts.linear_fc1.weight" in p and mistake != "no shared expert":
            half = math.sqrt(0.5) if sqrt_gate else 1.0
            scale = 1.0 if mistake == "shared expert not scaled" else half
            output = half * output + scale * swiglu(token, p, "mixer.shared_experts.", mistake)[0]
        outputs.append(output)
    tokens = len(outputs)
    balance = number * sum(probability[i] / tokens * (chosen[i] / (tokens * per_token)) for i in range(number))
    return torch.stack(outputs).view_as(x), balance


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy: logits [b, s, vocabulary], labels [b, s] -> [b, s]."""
    return logits.logsumexp(-1) - logits.gather(-1, labels[..., None])[..., 0]


def _layer(parameters: dict[str, Tensor], number: int) -> dict[str, Tensor]:
    prefix = f"decoder.layers.{number}."
    return {name.removeprefix(prefix): p for name, p in parameters.items() if name.startswith(prefix)}
