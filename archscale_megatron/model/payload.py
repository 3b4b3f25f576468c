"""What crosses a pipeline boundary: hidden states and shared state, in one tensor and without upcasting.

The hidden states are the residual stream, fp32; the shared state has the compute dtype. Megatron's schedules
pass one tensor of one dtype from stage to stage, so the state's bytes travel as fp32 words behind the hidden
channels: a boundary moves 4 h + 2 (d_memory + 2 kv) bytes a token in bf16, and no more.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from archscale_megatron.archs.architecture import Architecture, Payload
from archscale_megatron.layers.shared_state import SharedState


def packed_width(arch: Architecture, payload: Payload, config: TransformerConfig) -> int:
    """Last dimension of the tensor that carries `payload`, in elements of `config.pipeline_dtype`.

    Under sequence parallelism a rank's hidden states hold s / tp tokens while its state holds all s tokens
    of 1 / tp of the channels: the same number of elements a token as all the channels.
    """
    channels = arch.payload_size(payload)
    if not config.sequence_parallel:
        channels //= config.tensor_model_parallel_size
    words, rest = divmod(channels * config.params_dtype.itemsize, config.pipeline_dtype.itemsize)
    if rest:
        raise ValueError(
            f"{arch.family} at width {arch.hidden_size} leaves {channels} channels of shared state on a rank: "
            "an odd number cannot cross a pipeline boundary; use another tensor-parallel size"
        )
    return config.hidden_size + words


def pack(hidden_states: Tensor, state: SharedState, payload: Payload, width: int) -> Tensor:
    """hidden_states [s', b, h] and the parts of `state` that `payload` names -> [s', b, width].

    `width` may be more than the payload needs (the interleaved schedule has one width for all boundaries);
    what lies behind the payload is zero.
    """
    return _Pack.apply(width, hidden_states, *_parts(state, payload))


def unpack(
    packed: Tensor, payload: Payload, arch: Architecture, config: TransformerConfig
) -> tuple[Tensor, SharedState]:
    """The inverse of `pack`: packed [s', b, width] -> hidden states and shared state of this TP rank."""
    tp = config.tensor_model_parallel_size
    length = packed.shape[0] * (tp if config.sequence_parallel else 1)
    batch = packed.shape[1]
    shapes: list[tuple[int, ...]] = []
    for name in payload:
        if name == "memory":
            shapes.append((length, batch, arch.memory_size // tp))
        else:
            shapes += [(length, batch, arch.num_query_groups // tp, arch.head_dim)] * 2
    hidden_states, *parts = _Unpack.apply(packed, config.hidden_size, config.params_dtype, tuple(shapes))
    remaining = iter(parts)
    state = SharedState()
    for name in payload:
        if name == "memory":
            state.memory = next(remaining)
        else:
            state.key, state.value = next(remaining), next(remaining)
    return hidden_states, state


def _parts(state: SharedState, payload: Payload) -> list[Tensor]:
    parts: list[Tensor | None] = []
    for name in payload:
        parts += [state.memory] if name == "memory" else [state.key, state.value]
    return parts  # type: ignore[return-value]


def _join(width: int, hidden_states: Tensor, parts: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    packed = hidden_states.new_zeros(*hidden_states.shape[:2], width)
    offset = hidden_states.shape[-1]
    packed[..., :offset] = hidden_states
    for part in parts:
        words = part.contiguous().view(-1).view(packed.dtype).view(*packed.shape[:2], -1)
        packed[..., offset : offset + words.shape[-1]] = words
        offset += words.shape[-1]
    return packed


def _split(
    packed: Tensor, hidden_size: int, dtype: torch.dtype, shapes: tuple[tuple[int, ...], ...]
) -> tuple[Tensor, ...]:
    tokens = packed.shape[0] * packed.shape[1]
    out, offset = [packed[..., :hidden_size].contiguous()], hidden_size
    for shape in shapes:
        elements = int(torch.Size(shape).numel())
        words = elements // tokens * dtype.itemsize // packed.dtype.itemsize
        part = packed[..., offset : offset + words].contiguous()
        out.append(part.view(-1).view(dtype).view(shape))
        offset += words
    return tuple(out)


class _Pack(torch.autograd.Function):
    """The gradient of a packed tensor is packed alike: it is cut, not computed."""

    @staticmethod
    def forward(ctx: Any, width: int, hidden_states: Tensor, *parts: Tensor) -> Tensor:
        ctx.hidden_size = hidden_states.shape[-1]
        ctx.dtype = parts[0].dtype if parts else hidden_states.dtype
        ctx.shapes = tuple(tuple(part.shape) for part in parts)
        return _join(width, hidden_states, parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_split(grads[0], ctx.hidden_size, ctx.dtype, ctx.shapes)


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, packed: Tensor, hidden_size: int, dtype: torch.dtype, shapes: tuple[tuple[int, ...], ...]
    ) -> tuple[Tensor, ...]:
        ctx.width = packed.shape[-1]
        return _split(packed, hidden_size, dtype, shapes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _join(ctx.width, grads[0], grads[1:]), None, None, None
