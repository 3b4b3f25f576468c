"""Phi4Flash in plain torch, with its public names and config: loops, in whatever precision the weights have.

Shares nothing with the package; the scan is the independent one of `tests/reference_scans.py`.
"""

import math
from typing import Any

import torch
from torch import Tensor

from tests.reference_scans import mamba1, silu


def logits(config: dict[str, Any], weights: dict[str, Tensor], tokens: Tensor, mistake: str = "") -> Tensor:
    """tokens [s] -> [s, vocabulary].

    `mistake` leaves something out, so that a test can see that it would be noticed.
    """
    depth, half = config["num_hidden_layers"], config["num_hidden_layers"] // 2
    memory: Tensor = torch.empty(0)
    keys_values: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))
    x = weights["model.embed_tokens.weight"][tokens]
    for i in range(depth):
        p = {name.removeprefix(f"model.layers.{i}."): w for name, w in weights.items() if f".layers.{i}." in name}
        u = layer_norm(x, p, "input_layernorm")
        if i % config["mb_per_layer"] == 0 and i <= half:
            scan = {name.replace("attn.", "mixer."): w for name, w in p.items()}
            out, scanned = mamba1(u[None], scan, None)
            out = out[0]
            if i == half:
                memory = scanned[0]
        elif i % config["mb_per_layer"] == 0:
            out = (silu(u @ p["attn.in_proj.weight"].T) * memory) @ p["attn.out_proj.weight"].T
        else:
            projected = u @ p["attn.Wqkv.weight"].T + p["attn.Wqkv.bias"]
            head_dim = config["hidden_size"] // config["num_attention_heads"]
            if i <= half + 1:
                sizes = [config["hidden_size"], *[config["num_key_value_heads"] * head_dim] * 2]
                query, key, value = projected.split(sizes, -1)
                keys_values = key.unflatten(-1, (-1, head_dim)), value.unflatten(-1, (-1, head_dim))
            else:
                query = projected
            window = config["sliding_window"] if i < half else None
            out = attention(query.unflatten(-1, (-1, head_dim)), *keys_values, window, p, i, mistake)
            out = out @ p["attn.out_proj.weight"].T + p["attn.out_proj.bias"]
        x = x + out
        gate, up = (layer_norm(x, p, "post_attention_layernorm") @ p["mlp.fc1.weight"].T).chunk(2, -1)
        x = x + (silu(gate) * up) @ p["mlp.fc2.weight"].T
    x = layer_norm(x, weights, "model.final_layernorm")
    return x @ weights["model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"].T


def attention(
    query: Tensor, key: Tensor, value: Tensor, window: int | None, p: dict[str, Tensor], layer: int, mistake: str
) -> Tensor:
    """query [s, heads, head_dim], key and value [s, kv heads, head_dim] -> [s, heads * head_dim], pair by pair."""
    length, heads, head_dim = query.shape
    inner = {name: p[f"attn.inner_cross_attn.lambda_{name}"] for name in ("q1", "k1", "q2", "k2")}
    start = 0.8 - 0.6 * math.exp(-0.3 * layer)
    weight = (inner["q1"] * inner["k1"]).sum().exp() - (inner["q2"] * inner["k2"]).sum().exp() + start
    if mistake == "window":
        window = window and window + 1
    outputs: list[Tensor] = []
    for pair in range(heads // 2):
        group = pair // (heads // key.shape[1])
        both = torch.cat([value[:, 2 * group], value[:, 2 * group + 1]], -1)
        maps = []
        for which in (0, 1):
            scores = query[:, 2 * pair + which] @ key[:, 2 * group + which].T / math.sqrt(head_dim)
            for t in range(length):
                scores[t, t + 1 :] = -math.inf
                if window is not None:
                    scores[t, : max(0, t - window + 1)] = -math.inf
            maps.append(scores.softmax(-1) @ both)
        difference = maps[0] - (0.0 if mistake == "lambda" else weight) * maps[1]
        normed = difference / torch.sqrt((difference**2).mean(-1, keepdim=True) + 1e-5)
        outputs.append(normed * p["attn.inner_cross_attn.subln.weight"] * (1 - start))
    return torch.cat(outputs, -1)


def layer_norm(x: Tensor, p: dict[str, Tensor], name: str) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-5) * p[f"{name}.weight"] + p[f"{name}.bias"]
