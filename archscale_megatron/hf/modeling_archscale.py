"""ArchScale models for transformers: hybrids of Mamba, attention, Gated Memory Units, and shared keys and values.

Copied beside the weights of an export, so it needs torch and transformers alone; kernels of flash-attn, mamba-ssm and
flash-linear-attention are used on a GPU where they are installed.

Shapes: b sequences, s tokens of a call, n tokens that a layer sees: those it has kept of earlier calls, then the s.
In half precision the residual stream, the scans and the router compute in fp32, as in training.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_archscale import ArchScaleConfig

# transformers 5 has renamed past_key_values, between 5.0 and 5.24.
CACHE = next(
    field.name for field in dataclasses.fields(BaseModelOutputWithPast) if field.name in ("cache", "past_key_values")
)


class ArchScaleCache:
    """What layers keep between calls: a tuple of tensors for each layer that has a state, batch first.

    Attention keeps keys and values [b, kv_heads, tokens, size], of no more tokens than its window reaches back; the
    layer that writes the shared keys and values keeps them for all cross attentions. Recurrent layers keep the
    inputs that their convolution still sees [b, kernel - 1, channels], and the state of their scan, in fp32.
    """

    is_compileable = False
    is_linear = (False,)  # `generate` is to hand on the tokens behind those that were seen, and no others

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.states: dict[int, tuple[Tensor, ...]] = {}
        self.seen = 0  # tokens, padding included

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was."""
        for layer, state in self.states.items():
            self.states[layer] = tuple(x.index_select(0, beam_idx.to(x.device)) for x in state)


@dataclasses.dataclass
class Step:
    """What the layers of one forward pass share.

    Attributes:
        cache: states before the call, which layers replace by those after it; or None.
        real: bool [b, tokens of all calls], False at padding; None without padding.
        cos, sin: [b or 1, 1, s, head_dim / 2] of the RoPE angles, or None.
        memory: [b, s, channels], which GMUs read (arXiv 2507.06607).
        key, value: [b, kv_heads, n, size], which cross attentions read (arXiv 2405.05254).
    """

    cache: ArchScaleCache | None
    real: Tensor | None
    cos: Any = None
    sin: Any = None
    memory: Any = None
    key: Any = None
    value: Any = None

    def recall(self, layer: int) -> Any:
        """What `layer` has kept, or Nones."""
        return (None, None) if self.cache is None else self.cache.states.get(layer, (None, None))

    def keep(self, layer: int, *state: Tensor) -> None:
        if self.cache is not None:
            self.cache.states[layer] = state

    def masked(self, x: Tensor, value: float) -> Tensor:
        """x [b, s, channels], `value` at padding."""
        return x if self.real is None else x.masked_fill(~self.real[:, -x.shape[1] :, None], value)

    def narrow(self, tokens: int) -> None:
        """Go on with the last `tokens` of the call."""
        self.memory = None if self.memory is None else self.memory[:, -tokens:]
        if self.cos is not None:
            self.cos, self.sin = self.cos[:, :, -tokens:], self.sin[:, :, -tokens:]

    def to(self, device: torch.device) -> None:
        """For models whose layers are on several devices."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                setattr(self, field.name, value.to(device))


def fp32(x: Tensor) -> Tensor:
    """fp32, or float64 if x is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@functools.cache
def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def kernels(name: str, x: Tensor) -> Any:
    """The module `name` if it is installed and x on a GPU, else None."""
    return _module(name) if x.is_cuda else None


# Norms


class Norm(nn.Module):
    """RMSNorm, or LayerNorm with a bias, over the last dimension: in x's dtype, cast to the weight's."""

    def __init__(self, size: int, epsilon: float, bias: bool = False) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        weight, shape = self.weight.to(x.dtype), self.weight.shape
        if self.bias is None:
            return F.rms_norm(x, shape, weight, self.epsilon).to(self.weight.dtype)
        return F.layer_norm(x, shape, weight, self.bias.to(x.dtype), self.epsilon).to(self.weight.dtype)


class GatedNorm(Norm):
    """RMSNorm of x * silu(gate) over all channels (arXiv 2405.21060)."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(fp32(x) * F.silu(fp32(gate)))


# Attention

LAMBDAS = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")
BLOCK = 512  # queries at once: scores of so many rows, and no more, are in memory
SCAN_STEPS = 64  # of a selective scan at once, or on a CPU as many as give SCAN_STATES, which its caches hold
SCAN_STATES = 1 << 17  # elements


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    window: int | None,
    real: Tensor | None,
    sink: Tensor | None,
) -> Tensor:
    """softmax(scale * Q K^T) V, where a token sees the `window` tokens up to itself (None: all), but no padding.

    Args:
        query: [b, heads, s, d], of the last s of the n tokens.
        key, value: [b, kv_heads, n, d] and [b, kv_heads, n, e]; heads // kv_heads adjacent queries share one.
        real: bool [b, >= n], of which the last n are of these tokens.
        sink: [heads], the logit of one more thing that every token sees, without a value (not with a window).

    Returns:
        [b, heads, s, e].
    """
    (b, heads, s, _), kv_heads, size = query.shape, key.shape[1], value.shape[-1]
    if sink is not None:  # one more token, told by one more channel; its value is 0
        channel = (sink / scale).to(query.dtype)[:, None, None].expand(b, -1, s, 1)
        is_sink = F.pad(key.new_zeros(b, kv_heads, key.shape[2], 1), (0, 0, 1, 0), value=1.0)
        query, key, value = torch.cat([query, channel], -1), F.pad(key, (0, 0, 1, 0)), F.pad(value, (0, 0, 1, 0))
        key = torch.cat([key, is_sink], -1)
        real = None if real is None else F.pad(real[:, 1 - key.shape[2] :], (1, 0), value=True)
    n = key.shape[2]
    flash = kernels("flash_attn", query)
    if flash and real is None and query.dtype in (torch.float16, torch.bfloat16):
        width = max(query.shape[-1], size)  # the kernel wants one for all
        query, key, value = (F.pad(x, (0, width - x.shape[-1])).transpose(1, 2) for x in (query, key, value))
        sees = (-1 if window is None else window - 1, 0 if window else -1)
        out = flash.flash_attn_func(query, key, value, softmax_scale=scale, causal=True, window_size=sees)
        return out.transpose(1, 2)[..., :size]
    if real is not None:
        real = real[:, None, None, -n:]
    outputs: list[Tensor] = []
    block = BLOCK if window is None else min(BLOCK, max(64, window))
    for q in query.split(block, dim=2):
        rows, first = q.shape[2], n - s + sum(o.shape[2] for o in outputs)  # of the block, among the n
        start, stop = 0 if window is None else max(0, first - window + 1), first + rows
        mask = None
        if rows > 1 or real is not None:
            tokens = torch.arange(start, stop, device=q.device)
            back = tokens[first - start :, None] - tokens
            mask = (back >= 0) if window is None else (back >= 0) & (back < window)
            mask = mask[None, None]
            if real is not None:
                mask = mask & (real[..., start:stop] | (back == 0))  # padding sees itself: no row is empty
            mask = mask.repeat(1, 1, heads // kv_heads, 1)
        # Queries that share a key become rows of one head, so that no key is copied.
        out = F.scaled_dot_product_attention(
            q.reshape(b, kv_heads, -1, q.shape[-1]), key[:, :, start:stop], value[:, :, start:stop], mask, scale=scale
        )
        outputs.append(out.reshape(b, heads, rows, size))
    return torch.cat(outputs, 2)


def rotate(x: Tensor, step: Step) -> Tensor:
    """RoPE (arXiv 2104.09864) of x [b, heads, s, d]: channels j and j + d / 2 turn together."""
    if step.cos is None:
        return x
    cos, sin = step.cos.to(x.dtype), step.sin.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Attention(nn.Module):
    """Self-attention, full or with a window, or cross attention to the shared keys and values."""

    def __init__(self, config: ArchScaleConfig, layer: int) -> None:
        super().__init__()
        symbol, d = config.pattern[layer], config.head_dim
        self.layer, self.head_dim = layer, d
        self.cross = symbol == "X"
        self.window = config.window if symbol == "W" else config.full_window
        self.scale = d**-0.5 if config.softmax_scale is None else config.softmax_scale
        self.writes_memory, self.writes_kv = config.writer("U") == layer, config.writer("X") == layer
        self.reach = self.window  # tokens back that some reader of the keys sees
        if self.writes_kv and self.window and config.full_window:
            self.reach = max(self.window, config.full_window)
        elif self.writes_kv:
            self.reach = None

        heads, kv_heads = config.num_attention_heads, config.num_query_groups
        self.q_proj = nn.Linear(config.hidden_size, heads * d, bias=config.qkv_bias)
        if not self.cross:
            self.k_proj = nn.Linear(config.hidden_size, kv_heads * d, bias=config.qkv_bias)
            self.v_proj = nn.Linear(config.hidden_size, kv_heads * d, bias=config.qkv_bias)
        self.o_proj = nn.Linear(heads * d, config.hidden_size, bias=config.attention_output_bias)
        self.qk_norm = config.qk_norm and not self.cross
        if self.qk_norm:
            self.q_norm, self.k_norm = Norm(d, config.norm_epsilon), Norm(d, config.norm_epsilon)
        self.gate_proj = None
        if config.attention_gate:
            self.gate_proj = nn.Linear(config.hidden_size, heads, bias=config.qkv_bias)
        self.differential = config.differential_attention
        if self.differential:
            self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * (layer // 2))
            for name in LAMBDAS:
                self.register_parameter(name, nn.Parameter(torch.zeros(d)))
            self.sub_norm = Norm(2 * d, 1e-5)
        has_sink = config.attention_sink and not self.differential
        self.sink = nn.Parameter(torch.zeros(heads)) if has_sink else None

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """[b, s, hidden] -> the same shape."""
        query = self._heads(self.q_proj(x), self.head_dim)
        if self.cross:
            key, value = step.key, step.value
        else:
            key = self._heads(self.k_proj(x), self.head_dim)
            # The two values of a pair of differential attention lie side by side.
            value = self._heads(self.v_proj(x), self.head_dim * (1 + self.differential))
            if self.qk_norm:
                query, key = self.q_norm(query), self.k_norm(key)
            key, value = self._with_kept(rotate(key, step), value, step)
        query = rotate(query, step)
        if self.differential:
            out = self._difference(query, key, value, step)
        else:
            out = attend(query, key, value, self.scale, self.window, step.real, self.sink)
        out = out.transpose(1, 2).flatten(2)
        if self.gate_proj is not None:
            gate = torch.sigmoid(fp32(self.gate_proj(x)))[..., None]
            out = (out.unflatten(-1, (-1, self.head_dim)) * gate).to(out.dtype).flatten(2)
        if self.writes_memory:
            step.memory = out
        return self.o_proj(out)

    @staticmethod
    def _heads(x: Tensor, size: int) -> Tensor:
        return x.unflatten(-1, (-1, size)).transpose(1, 2)

    def _with_kept(self, key: Tensor, value: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """[b, kv_heads, s, .] -> [b, kv_heads, n, .]; what later calls will see is kept."""
        old_key, old_value = step.recall(self.layer)
        if old_key is not None:
            key, value = torch.cat([old_key, key], 2), torch.cat([old_value, value], 2)
        if self.writes_kv:
            step.key, step.value = key, value
        start = 0 if self.reach is None else max(0, key.shape[2] - self.reach + 1)
        step.keep(self.layer, *(x[:, :, start:].clone() if start else x for x in (key, value)))
        return key, value

    def _difference(self, query: Tensor, key: Tensor, value: Tensor, step: Step) -> Tensor:
        """Differential attention (arXiv 2410.05258): norm(A1 v - lambda A2 v) (1 - lambda_init) of each pair of
        adjacent heads [b, heads / 2, s, 2 d], A1 and A2 their attention maps."""
        first, second = (
            attend(query[:, i::2], key[:, i::2], value, self.scale, self.window, step.real, None) for i in (0, 1)
        )
        q1, k1, q2, k2 = (fp32(self.get_parameter(name)) for name in LAMBDAS)
        factor = (q1 * k1).sum().exp() - (q2 * k2).sum().exp() + self.lambda_init
        return self.sub_norm(first - factor * second) * (1 - self.lambda_init)


# Recurrent mixers


class CausalConv1d(nn.Conv1d):
    """A depthwise causal convolution with its silu; sums in fp32."""

    def __init__(self, channels: int, kernel: int, bias: bool = True) -> None:
        super().__init__(channels, channels, kernel, groups=channels, bias=bias)

    def forward(self, x: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """x [b, s, d] behind `past` [b, kernel - 1, d] or zeros -> [b, s, d] and the next past."""
        s, kernel = x.shape[1], self.kernel_size[0]
        x = F.pad(x, (0, 0, kernel - 1, 0)) if past is None else torch.cat([past, x], 1)
        taps, values = fp32(self.weight).squeeze(1).t(), fp32(x)
        y = values[:, :s] * taps[0]
        for i in range(1, kernel):
            y = torch.addcmul(y, values[:, i : i + s], taps[i])
        if self.bias is not None:
            y = y + fp32(self.bias)
        return F.silu(y).to(x.dtype), x[:, s:].clone()


class StepSizeProjection(nn.Linear):
    """dt_proj of Mamba-1: its bias is added in fp32."""

    def forward(self, x: Tensor) -> Tensor:
        return fp32(F.linear(x, self.weight)) + self.bias


class Recurrent(nn.Module):
    """A mixer whose recurrence is sensitive to `fp32_parameters`: they stay in fp32 in a model of half precision."""

    fp32_parameters: tuple[str, ...]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        kept = {name: self.get_parameter(name).data for name in self.fp32_parameters}
        super()._apply(fn, recurse)
        for name, data in kept.items():
            parameter = self.get_parameter(name)
            if parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = data.to(parameter.device)
        return self


def _fp32_parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, dtype=torch.float32))  # whatever the default


class Mamba1(Recurrent):
    """out_proj(silu(z) * y) with y the selective scan of silu(conv(x)) (arXiv 2312.00752); the memory is y."""

    fp32_parameters = ("A_log", "D", "dt_proj.bias")

    def __init__(self, config: ArchScaleConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.writes_memory = layer, config.writer("U") == layer
        d, n, rank = config.expand * config.hidden_size, config.state_size, math.ceil(config.hidden_size / 16)
        self.sizes = [rank, n, n]
        self.in_proj = nn.Linear(config.hidden_size, 2 * d, bias=False)
        self.conv1d = CausalConv1d(d, config.conv_kernel)
        self.x_proj = nn.Linear(d, sum(self.sizes), bias=False)
        self.dt_proj = StepSizeProjection(rank, d, bias=False)
        self.dt_proj.bias = _fp32_parameter(d)
        self.A_log, self.D = _fp32_parameter(d, n), _fp32_parameter(d)
        self.out_proj = nn.Linear(d, config.hidden_size, bias=False)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """[b, s, hidden] -> the same shape."""
        past, state = step.recall(self.layer)
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x, past = self.conv1d(step.masked(x, 0.0), past)
        dt, B, C = self.x_proj(x).split(self.sizes, dim=-1)
        dt = step.masked(self.dt_proj(dt), -math.inf)  # a step of size 0
        y, state = selective_scan(x, dt, -torch.exp(self.A_log), B, C, self.D, state)
        step.keep(self.layer, past, state)
        if self.writes_memory:
            step.memory = y
        return self.out_proj((F.silu(fp32(z)) * y).to(z.dtype))


class Mamba2(Recurrent):
    """out_proj(norm(y * silu(z))) with y the scan of x, and [x | B | C] = silu(conv(.)), z and dt from in_proj (arXiv
    2405.21060). The heads share one group of B and C. The memory is y."""

    fp32_parameters = ("A_log", "D", "dt_bias")

    def __init__(self, config: ArchScaleConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.writes_memory = layer, config.writer("U") == layer
        self.head_dim, n = config.mamba2_head_dim, config.mamba2_state_size
        heads = 8 * math.ceil(2 * config.hidden_size / self.head_dim / 8)
        d = heads * self.head_dim
        self.projected, self.convolved = [d, d + 2 * n, heads], [d, n, n]
        self.in_proj = nn.Linear(config.hidden_size, sum(self.projected), bias=False)
        self.conv1d = CausalConv1d(d + 2 * n, config.conv_kernel)
        self.A_log, self.D, self.dt_bias = (_fp32_parameter(heads) for _ in range(3))
        self.norm = GatedNorm(d, config.norm_epsilon)
        self.out_proj = nn.Linear(d, config.hidden_size, bias=False)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """[b, s, hidden] -> the same shape."""
        past, state = step.recall(self.layer)
        z, x, dt = self.in_proj(x).split(self.projected, dim=-1)
        x, past = self.conv1d(step.masked(x, 0.0), past)
        x, B, C = x.split(self.convolved, dim=-1)
        dt = step.masked(fp32(dt) + self.dt_bias, -math.inf)  # a step of size 0
        x = x.unflatten(-1, (-1, self.head_dim))
        y, state = ssd(x, dt, -torch.exp(self.A_log), B, C, self.D, state)
        step.keep(self.layer, past, state)
        y = y.flatten(2)
        if self.writes_memory:
            step.memory = y
        return self.out_proj(self.norm(y, z))


class GatedDeltaNet(Recurrent):
    """out_proj(norm(o * silu(z))) with o the gated delta rule of [q | k | v] = silu(conv(.)) (arXiv 2412.06464), and z,
    beta and alpha from in_proj: beta = 2 sigmoid(.), log decay = -exp(A_log) softplus(alpha + dt_bias). The memory is
    o."""

    fp32_parameters = ("A_log", "dt_bias")

    def __init__(self, config: ArchScaleConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.writes_memory = layer, config.writer("U") == layer
        self.heads = math.ceil(3 * config.hidden_size // 4 / config.gdn_head_dim)
        keys = self.heads * config.gdn_head_dim
        values = 2 * keys
        self.projected, self.convolved = [2 * keys + values, values, self.heads, self.heads], [keys, keys, values]
        self.in_proj = nn.Linear(config.hidden_size, sum(self.projected), bias=False)
        self.conv1d = CausalConv1d(2 * keys + values, config.conv_kernel, bias=False)
        self.A_log, self.dt_bias = _fp32_parameter(self.heads), _fp32_parameter(self.heads)
        self.norm = GatedNorm(values, config.norm_epsilon)
        self.out_proj = nn.Linear(values, config.hidden_size, bias=False)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """[b, s, hidden] -> the same shape."""
        past, state = step.recall(self.layer)
        qkv, z, beta, alpha = self.in_proj(x).split(self.projected, dim=-1)
        qkv, past = self.conv1d(step.masked(qkv, 0.0), past)
        q, k, v = (x.unflatten(-1, (self.heads, -1)) for x in qkv.split(self.convolved, dim=-1))
        beta = 2 * torch.sigmoid(fp32(beta))  # padding writes nothing: its key and value are 0
        g = -torch.exp(self.A_log) * F.softplus(fp32(alpha) + self.dt_bias)
        o, state = gated_delta_rule(q, k, v, g, beta, state)
        step.keep(self.layer, past, state)
        o = o.flatten(2)
        if self.writes_memory:
            step.memory = o
        return self.out_proj(self.norm(o, z))


def selective_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """h_t = exp(delta_t A) h_{t-1} + delta_t x_t B_t and y_t = C_t . h_t + D x_t for every channel, with delta =
    softplus(dt).

    Args:
        x, dt: [b, s, d].
        A, D: [d, n] and [d].
        B, C: [b, s, n].
        state: h [b, d, n] before the first step, or None for zeros.

    Returns:
        y [b, s, d] in the dtype of x, and the state behind the last step.
    """
    package = kernels("mamba_ssm.ops.selective_scan_interface", x)
    if package and state is None:
        u, B, C = (fp32(v).transpose(1, 2) for v in (x, B, C))
        y, state = package.selective_scan_fn(
            u, dt.transpose(1, 2), A, B, C, D, delta_softplus=True, return_last_state=True
        )
        return y.transpose(1, 2).to(x.dtype), state
    with torch.autocast(x.device.type, enabled=False):
        if state is None:
            state = fp32(x).new_zeros(len(x), *A.shape)
        steps = SCAN_STEPS if x.is_cuda else min(SCAN_STEPS, max(SCAN_STATES // state.numel(), 1))
        outputs = []
        inputs = (fp32(x), F.softplus(dt), fp32(B), fp32(C))
        for u, delta, B_c, C_c in zip(*(v.split(steps, dim=1) for v in inputs), strict=True):
            decay = (delta[..., None] * A).exp_()  # [b, steps, d, n]
            states = (delta * u)[..., None] * B_c[:, :, None]  # what each step adds
            if torch.is_grad_enabled():
                after = []
                for a, h in zip(decay.unbind(1), states.unbind(1), strict=True):
                    state = torch.addcmul(h, a, state)
                    after.append(state)
                states = torch.stack(after, 1)
            else:  # in the same memory, which is faster
                for a, h in zip(decay.unbind(1), states.unbind(1), strict=True):
                    state = h.addcmul_(a, state)
            outputs.append((states @ C_c[..., None]).squeeze(-1) + D * u)
        return torch.cat(outputs, 1).to(x.dtype), state.clone()


def ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """h_t = exp(delta_t A) h_{t-1} + B_t (delta_t x_t)^T and y_t = h_t^T C_t + D x_t for every head, delta =
    softplus(dt). In chunks, whose steps are matrix products (arXiv 2405.21060, section 6).

    Args:
        x: [b, s, h, p].
        dt: [b, s, h].
        A, D: [h].
        B, C: [b, s, n], of all heads.
        state: h [b, h, n, p] before the first step, or None for zeros.

    Returns:
        y [b, s, h, p] in the dtype of x, and the state behind the last step.
    """
    package = kernels("mamba_ssm.ops.triton.ssd_combined", x)
    if package and state is None:
        y, state = package.mamba_chunk_scan_combined(
            x, dt, A, B[:, :, None], C[:, :, None], chunk_size=128, D=D, dt_softplus=True, return_final_states=True
        )
        return y, fp32(state).transpose(2, 3)
    with torch.autocast(x.device.type, enabled=False):
        if state is None:
            state = fp32(x).new_zeros(len(x), x.shape[2], B.shape[2], x.shape[3])
        outputs = []
        delta = F.softplus(dt)
        inputs = (fp32(x), delta[..., None] * fp32(x), delta * A, fp32(B)[:, :, None], fp32(C)[:, :, None])
        for chunk in zip(*(v.transpose(1, 2).split(128, dim=2) for v in inputs), strict=True):
            u, drive, log_decay, B_c, C_c = chunk  # [b, h or 1, steps, ...]
            of_state, of_steps = chunk_decay(log_decay)
            y = (C_c @ B_c.mT * of_steps) @ drive + (C_c @ state) * of_state + D[:, None, None] * u
            state = of_state[..., -1:, :] * state + B_c.mT @ (of_steps[..., -1, :, None] * drive)
            outputs.append(y.transpose(1, 2))
        return torch.cat(outputs, 1).to(x.dtype), state


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """S_t = exp(g_t) S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T and o_t = S_t q_t for every head, with q and k
    of length 1, and q over sqrt(dk).

    In chunks: what step t really adds is u_t k_t^T with u_t = beta_t (v_t - exp(g_t) S_{t-1} k_t), so the u's of a
    chunk solve a triangular system (arXiv 2406.06484).

    Args:
        q, k: [b, s, h, dk].
        v: [b, s, h, dv].
        g, beta: [b, s, h].
        state: S^T [b, h, dk, dv] before the first step, or None for zeros.

    Returns:
        o [b, s, h, dv] in the dtype of v, and the state behind the last step.
    """
    package = kernels("fla.ops.gated_delta_rule", v)
    if package and state is None and v.dtype in (torch.float16, torch.bfloat16):  # it refuses fp32
        return package.chunk_gated_delta_rule(
            q, k, v, g, beta.to(v.dtype), output_final_state=True, use_qk_l2norm_in_kernel=True
        )
    with torch.autocast(v.device.type, enabled=False):
        dtype = v.dtype
        q, k, v = (fp32(x) for x in (q, k, v))
        q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))  # FLA's epsilon
        q = q * q.shape[-1] ** -0.5
        if state is None:
            state = v.new_zeros(len(v), v.shape[2], k.shape[3], v.shape[3])
        outputs = []
        for chunk in zip(*(x.transpose(1, 2).split(64, dim=2) for x in (q, k, v, g, beta)), strict=True):
            q, k, v, g, beta = chunk  # [b, h, steps, ...]
            of_state, of_steps = chunk_decay(g)
            beta = beta[..., None]
            replaced = (beta * of_steps * (k @ k.mT)).tril(-1)  # the solver takes the diagonal for ones
            added = beta * (v - of_state * (k @ state))
            u = torch.linalg.solve_triangular(replaced, added, upper=False, unitriangular=True)
            outputs.append(((of_steps * (q @ k.mT)) @ u + of_state * (q @ state)).transpose(1, 2))
            state = of_state[..., -1:, :] * state + (of_steps[..., -1, :, None] * k).mT @ u
        return torch.cat(outputs, 1).to(dtype), state


def chunk_decay(log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """What is left, after each step of a chunk, of the state before it and of what each step added.

    Sums of logarithms are taken for every pair of steps: differences of running sums would lose digits.

    Args:
        log_decay: [b, h, steps], not positive.

    Returns:
        [b, h, steps, 1] for the state, and [b, h, steps, steps], in row t for step j <= t.
    """
    steps = log_decay.shape[-1]
    ones = torch.ones(steps, steps + 1, dtype=torch.bool, device=log_decay.device)
    sums = log_decay[..., None].masked_fill(~ones.tril(), 0.0).cumsum(-2)
    decay = sums.exp().masked_fill(~ones.tril(1), 0.0)
    return decay[..., :1], decay[..., 1:]


# Mixers that look at one token


class GatedMemoryUnit(nn.Module):
    """out_proj(silu(in_proj(x)) * memory) (arXiv 2507.06607), normed before out_proj if the memory's own layer is."""

    def __init__(self, config: ArchScaleConfig, layer: int) -> None:
        super().__init__()
        source = config.pattern[config.writer("U") or 0]
        size = {
            "m": config.expand * config.hidden_size,
            "M": 8 * math.ceil(2 * config.hidden_size / config.mamba2_head_dim / 8) * config.mamba2_head_dim,
            "G": 2 * math.ceil(3 * config.hidden_size // 4 / config.gdn_head_dim) * config.gdn_head_dim,
            "-": config.ffn_hidden_size,
        }.get(source, config.num_attention_heads * config.head_dim)
        self.in_proj = nn.Linear(config.hidden_size, size, bias=config.linear_bias)
        self.norm = GatedNorm(size, config.norm_epsilon) if source in "MG" else None
        self.out_proj = nn.Linear(size, config.hidden_size, bias=config.linear_bias)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """[b, s, hidden] -> the same shape."""
        gate = self.in_proj(x)
        if self.norm is not None:
            return self.out_proj(self.norm(step.memory, gate))
        return self.out_proj((F.silu(fp32(gate)) * step.memory).to(gate.dtype))


class SwiGLU(nn.Module):
    """down_proj(silu(gate_proj(x)) * up_proj(x))."""

    def __init__(self, hidden_size: int, size: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, size, bias=bias)
        self.down_proj = nn.Linear(size, hidden_size, bias=bias)

    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """[tokens, hidden], each token's output times its `weight` [tokens, 1] fp32 -> [tokens, hidden]."""
        y = F.silu(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(y if weight is None else (y * weight).to(y.dtype))


class MLP(SwiGLU):
    """All of a layer's channels; the memory is the up branch."""

    def __init__(self, config: ArchScaleConfig, layer: int) -> None:
        super().__init__(config.hidden_size, config.ffn_hidden_size, config.linear_bias)
        self.writes_memory = config.writer("U") == layer

    def forward(self, x: Tensor, step: Step) -> Tensor:  # type: ignore[override]
        """[b, s, hidden] -> the same shape."""
        up = self.up_proj(x)
        if self.writes_memory:
            step.memory = up
        return self.down_proj(F.silu(self.gate_proj(x)) * up)


class Experts(nn.Module):
    """The sum of a token's chosen experts, each times the softmax of the chosen experts' logits or, with SqrtGate
    (arXiv 2603.28743), its root; and of the shared expert."""

    def __init__(self, config: ArchScaleConfig, layer: int) -> None:
        super().__init__()
        shared, size = config.shared_expert, config.ffn_hidden_size // config.moe_top_k
        number = config.sparsity * config.moe_top_k - shared
        self.top_k, self.sqrt_gate = config.moe_top_k - shared, config.sqrt_gate
        self.multiplier = config.router_multiplier
        self.router = nn.Linear(config.hidden_size, number, bias=False)
        self.experts = nn.ModuleList(SwiGLU(config.hidden_size, size) for _ in range(number))
        self.shared_expert = SwiGLU(config.hidden_size, size) if shared else None

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """[b, s, hidden] -> the same shape."""
        shape, x = x.shape, x.flatten(0, 1)
        logits, chosen = (self.multiplier * F.linear(fp32(x), fp32(self.router.weight))).topk(self.top_k)
        weights = logits.softmax(-1)
        if self.sqrt_gate:
            weights = (weights + 1e-30).sqrt()
        out = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            token, choice = torch.where(chosen == expert)
            out = out.index_add(0, token, self.experts[expert](x[token], weights[token, choice, None]))
        if self.shared_expert is not None:
            out = out + self.shared_expert(x)
            if self.sqrt_gate:
                out = out * math.sqrt(0.5)
        return out.view(shape)


# Models

MIXERS = {
    "m": Mamba1, "M": Mamba2, "G": GatedDeltaNet, "W": Attention, "*": Attention, "X": Attention,
    "U": GatedMemoryUnit, "-": MLP, "E": Experts,
}  # fmt: skip


class ArchScaleLayer(nn.Module):
    """x + residual_multiplier * mixer(norm(x)), summed in the dtype of x."""

    def __init__(self, config: ArchScaleConfig, layer: int) -> None:
        super().__init__()
        self.multiplier = config.residual_multiplier
        self.norm = Norm(config.hidden_size, config.norm_epsilon, bias=config.normalization == "LayerNorm")
        self.mixer = MIXERS[config.pattern[layer]](config, layer)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """[b, s, hidden] -> the same shape."""
        step.to(x.device)
        return x + self.mixer(self.norm(x), step) * self.multiplier


class ArchScalePreTrainedModel(PreTrainedModel):
    config_class = ArchScaleConfig
    base_model_prefix = "model"
    _no_split_modules: Any = ["ArchScaleLayer"]
    _skip_keys_device_placement: Any = ["past_key_values"]
    _supports_sdpa = True
    _is_stateful = True  # no state can go back to an earlier token

    def _init_weights(self, module: Any) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            # transformers 5 comes here with parameters that it has loaded, too.
            if not getattr(parameter, "_is_hf_initialized", False):
                _initialize(module, name, parameter.data, self.config.initializer_range)


def _initialize(module: nn.Module, name: str, value: Tensor, deviation: float) -> None:
    """Write initial values for the parameter `name` of `module`; `deviation` is that of matrices."""
    if isinstance(module, CausalConv1d):
        bound = module.kernel_size[0] ** -0.5  # torch's own
        value.uniform_(-bound, bound)
    elif name == "dt_bias" or (name == "bias" and isinstance(module, StepSizeProjection)):
        # What softplus makes a step size of, drawn log-uniformly from [1e-3, 0.1] (arXiv 2312.00752, section 3.6).
        value.uniform_(math.log(1e-3), math.log(0.1)).exp_()
        value.copy_(value.expm1().log())
    elif name == "A_log" and isinstance(module, Mamba1):
        value.copy_(torch.arange(1, value.shape[1] + 1).log().expand_as(value))
    elif name == "A_log":
        value.uniform_(1.0, 16.0).log_()
    elif name in LAMBDAS:
        value.normal_(0.0, 0.1)
    elif name == "D" or (name == "weight" and isinstance(module, Norm)):
        value.fill_(1.0)
    elif name == "weight":
        value.normal_(0.0, deviation)
    else:  # biases and sinks
        value.zero_()


class ArchScaleModel(ArchScalePreTrainedModel):
    """The hidden states behind the last norm, times the multiplier of logits."""

    def __init__(self, config: ArchScaleConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(ArchScaleLayer(config, layer) for layer in range(len(config.pattern)))
        self.norm = Norm(config.hidden_size, config.norm_epsilon, bias=config.normalization == "LayerNorm")
        # Behind these layers a token's hidden states depend on those of no other token.
        self.last_mixing = max((i for i, symbol in enumerate(config.pattern) if symbol in "mMGW*"), default=-1)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def set_input_embeddings(self, value: Any) -> None:
        self.embed_tokens = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: ArchScaleCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        tokens_to_keep: int = 0,
        cache: ArchScaleCache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple:
        """Hidden states of input_ids [b, s] (or inputs_embeds [b, s, hidden]), which follow the tokens of the cache.

        Args:
            attention_mask: [b, tokens of the cache + s], 0 at padding, which nothing sees; left of a sequence, or right
                of it if it does not go on. Positions follow from it: position_ids are refused.
            output_hidden_states: of the embedding, and behind each ArchScale layer, the last one normed.
            tokens_to_keep: return the hidden states of the last so many tokens only (0: all), and do not compute those
                of others where nothing depends on them: behind the last self-attention or recurrent layer.
            cache: the later name of past_key_values.
        """
        if kwargs.get("position_ids") is not None or kwargs.get("output_attentions"):
            raise ValueError("position_ids and output_attentions are not known here; give attention_mask, 0 at padding")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, and not both")
        x = fp32(self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds)
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        cache = past_key_values if cache is None else cache
        cache = ArchScaleCache() if use_cache and cache is None else cache
        step = self._step(x, attention_mask, cache)
        output_hidden_states = (
            self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        )
        states = [x]
        s = x.shape[1]
        for i, layer in enumerate(self.layers):
            if i == self.last_mixing + 1 and tokens_to_keep and not output_hidden_states:
                x = x[:, -tokens_to_keep:]
                step.narrow(tokens_to_keep)
            x = layer(x, step)
            if output_hidden_states and i % 2 and i + 1 < len(self.layers):
                states.append(x)
        x = self.norm(x) * self.config.logit_multiplier
        if cache is not None:
            cache.seen += s
        all_states: Any = (*states, x) if output_hidden_states else None
        output: Any = BaseModelOutputWithPast(x[:, -tokens_to_keep:], cache, all_states)  # type: ignore[arg-type]
        return output.to_tuple() if return_dict is False else output

    def _step(self, x: Tensor, attention_mask: Tensor | None, cache: ArchScaleCache | None) -> Step:
        b, s = x.shape[:2]
        past = 0 if cache is None else cache.seen
        real = None
        if attention_mask is not None:
            if attention_mask.shape != (b, past + s):
                raise ValueError(
                    f"attention_mask {list(attention_mask.shape)}: give {[b, past + s]}, with the tokens of the cache"
                )
            real = None if attention_mask.all() else attention_mask.bool()
        cos = sin = None
        if self.config.rotary_base is not None:
            positions = torch.arange(past, past + s, device=x.device)[None]
            if real is not None:
                positions = (real.long().cumsum(1) - 1).clamp(min=0)[:, -s:]
            d = self.config.head_dim
            frequencies = 1.0 / self.config.rotary_base ** (torch.arange(0, d, 2, dtype=x.dtype, device=x.device) / d)
            angles = (positions.to(x.dtype)[..., None] * frequencies)[:, None]
            cos, sin = angles.cos(), angles.sin()
        return Step(cache, real, cos, sin)


class ArchScaleForCausalLM(ArchScalePreTrainedModel, GenerationMixin):  # type: ignore[misc]
    _tied_weights_keys: Any = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: ArchScaleConfig) -> None:
        super().__init__(config)
        self.model = ArchScaleModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: ArchScaleCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: ArchScaleCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits [b, s, vocabulary] of input_ids [b, s]; see `ArchScaleModel.forward`.

        Args:
            labels: [b, s], for the loss; it moves them by one token itself. -100 is for tokens without a loss.
            logits_to_keep: logits of the last so many tokens only (0: all), or of the tokens with these indices.
        """
        keep = logits_to_keep if isinstance(logits_to_keep, int) and labels is None else 0
        hidden: Any = self.model(
            input_ids, attention_mask, past_key_values, inputs_embeds, use_cache, output_hidden_states,
            tokens_to_keep=keep, cache=cache, **kwargs,
        )  # fmt: skip
        hidden_states = hidden.last_hidden_state
        if isinstance(logits_to_keep, Tensor):
            hidden_states = hidden_states[:, logits_to_keep]
        logits = self.lm_head(hidden_states)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        output: Any = CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=hidden.hidden_states, **{CACHE: getattr(hidden, CACHE)}
        )
        return output.to_tuple() if return_dict is False else output

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict, *args: Any) -> Any:
        """Called by `generate`, which would make a cache of keys and values alone."""
        if generation_config.use_cache and model_kwargs.get(CACHE) is None:
            model_kwargs[CACHE] = ArchScaleCache()

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Any, inputs_embeds: Any = None, position_ids: Any = None, **kwargs: Any
    ) -> dict:
        """transformers', without the positions that it makes for chunks of a prompt, which know no padding."""
        return super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
