"""The recurrent mixers of `tests/reference.py`, step by step.

Mamba arXiv 2312.00752, Mamba-2 arXiv 2405.21060, Gated DeltaNet arXiv 2412.06464. Each takes u [b, s, w], the layer's
parameters and a mistake to make or None, and returns the mixer's output [b, s, w] and the memory [b, s, channels].
"""

import torch
from torch import Tensor


def mamba1(u: Tensor, p: dict[str, Tensor], mistake: str | None) -> tuple[Tensor, Tensor]:
    x, z = (u @ half.T for half in p["mixer.in_proj.weight"].chunk(2))
    if mistake == "x and z swapped":
        x, z = z, x
    x = _conv(x, p, mistake)

    n, rank = p["mixer.A_log"].shape[1], p["mixer.dt_proj.weight"].shape[1]
    steps, B, C = (x @ p["mixer.x_proj.weight"].T).split([rank, n, n], -1)
    if mistake == "B and C swapped":
        B, C = C, B
    steps = steps @ p["mixer.dt_proj.weight"].T
    if mistake != "no step size bias":
        steps = steps + p["mixer.dt_proj.bias"]
    delta = torch.log(1 + torch.exp(steps))

    A, D = -torch.exp(p["mixer.A_log"]), p["mixer.D"]
    h, scanned = x.new_zeros(*x[:, 0].shape, n), []
    for t in range(x.shape[1]):
        decay = torch.exp(delta[:, t, :, None] * A)
        h = decay * h + (delta[:, t] * x[:, t])[..., None] * B[:, t, None]
        scanned.append((h * C[:, t, None]).sum(-1))
    scan = torch.stack(scanned, 1)
    y = scan + D * x
    gated = y * silu(z)
    memory = {"memory after the gate": gated, "memory without D x": scan}.get(mistake or "", y)
    return gated @ p["mixer.out_proj.weight"].T, memory


def mamba2(u: Tensor, p: dict[str, Tensor], mistake: str | None) -> tuple[Tensor, Tensor]:
    """One step size and one A a head; all heads share B and C."""
    d, heads = p["mixer.norm.weight"].numel(), p["mixer.A_log"].numel()
    n = (p["mixer.in_proj.weight"].shape[0] - 2 * d - heads) // 2
    z, x_B_C, steps = (u @ p["mixer.in_proj.weight"].T).split([d, d + 2 * n, heads], -1)
    if mistake == "z and x swapped":
        z, x_B_C = x_B_C[..., :d], torch.cat([z, x_B_C[..., d:]], -1)
    x, B, C = _conv(x_B_C, p, mistake).split([d, n, n], -1)
    if mistake == "B and C swapped":
        B, C = C, B
    if mistake != "no step size bias":
        steps = steps + p["mixer.dt_bias"]
    delta = torch.log(1 + torch.exp(steps))

    A, D = -torch.exp(p["mixer.A_log"]), p["mixer.D"]
    x = x.unflatten(-1, (heads, -1))
    h, scanned = x.new_zeros(*x[:, 0].shape, n), []  # state [b, heads, head_dim, n]
    for t in range(x.shape[1]):
        decay = torch.exp(delta[:, t] * A)[..., None, None]
        h = decay * h + (delta[:, t, :, None] * x[:, t])[..., None] * B[:, t, None, None]
        scanned.append((h * C[:, t, None, None]).sum(-1))
    scan = torch.stack(scanned, 1)
    y = (scan + D[:, None] * x).flatten(2)
    normed = _gated_norm(y, z, p, mistake)
    memory = {"memory after the norm": normed, "memory without D x": scan.flatten(2)}.get(mistake or "", y)
    return normed @ p["mixer.out_proj.weight"].T, memory


def gated_delta_net(u: Tensor, p: dict[str, Tensor], mistake: str | None) -> tuple[Tensor, Tensor]:
    """Values are twice as large as keys; beta goes up to 2."""
    values, heads = p["mixer.norm.weight"].numel(), p["mixer.A_log"].numel()
    qkv, z, beta, alpha = (u @ p["mixer.in_proj.weight"].T).split([2 * values, values, heads, heads], -1)
    query, key, value = (
        x.unflatten(-1, (heads, -1)) for x in _conv(qkv, p, mistake).split([values // 2, values // 2, values], -1)
    )
    if mistake == "queries and keys swapped":
        query, key = key, query
    query = query / torch.sqrt((query * query).sum(-1, keepdim=True) + 1e-6) / query.shape[-1] ** 0.5
    if mistake != "keys not normed":
        key = key / torch.sqrt((key * key).sum(-1, keepdim=True) + 1e-6)
    beta = (1 if mistake == "beta at most 1" else 2) / (1 + torch.exp(-beta))
    if mistake != "no step size bias":
        alpha = alpha + p["mixer.dt_bias"]
    decay = torch.exp(-torch.exp(p["mixer.A_log"]) * torch.log(1 + torch.exp(alpha)))

    S, read = u.new_zeros(len(u), heads, value.shape[-1], key.shape[-1]), []  # maps keys to values
    for t in range(u.shape[1]):
        k, v, b, a = key[:, t], value[:, t], beta[:, t, :, None], decay[:, t, :, None, None]
        if mistake != "decay after the update":
            S = a * S
        S = S + (b * (v - (S * k[:, :, None]).sum(-1)))[..., None] * k[:, :, None]
        if mistake == "decay after the update":
            S = a * S
        read.append((S * query[:, t, :, None]).sum(-1))
    o = torch.stack(read, 1).flatten(2)
    normed = _gated_norm(o, z, p, mistake, heads)
    return normed @ p["mixer.out_proj.weight"].T, normed if mistake == "memory after the norm" else o


def _conv(x: Tensor, p: dict[str, Tensor], mistake: str | None) -> Tensor:
    """silu of the causal depthwise convolution; the last tap is the current token's."""
    weight, bias = p["mixer.conv1d.weight"], p.get("mixer.conv1d.bias", torch.zeros(()).to(x))
    taps, late = weight.shape[-1], 1 if mistake == "conv shifted by one" else 0
    out = []
    for t in range(x.shape[1]):
        y = bias.expand_as(x[:, t])
        for j in range(taps):
            if t - j - late >= 0:
                y = y + weight[:, 0, taps - 1 - j] * x[:, t - j - late]
        out.append(silu(y))
    return torch.stack(out, 1)


def _gated_norm(y: Tensor, z: Tensor, p: dict[str, Tensor], mistake: str | None, heads: int = 1) -> Tensor:
    """RMSNorm of y * silu(z) over all channels."""
    x = y if mistake == "norm before gate" else y * silu(z)
    grouped = x.unflatten(-1, (heads if mistake == "norm of each head" else 1, -1))
    x = (grouped / torch.sqrt((grouped * grouped).mean(-1, keepdim=True) + 1e-5)).flatten(-2) * p["mixer.norm.weight"]
    return x * silu(z) if mistake == "norm before gate" else x


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))
