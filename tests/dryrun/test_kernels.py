"""What the stand-ins of fused kernels keep, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from archscale_megatron.dryrun.kernels import fused_kernels
from archscale_megatron.dryrun.recorder import Recorder
from archscale_megatron.ops.attention import attention
from archscale_megatron.ops.causal_conv import causal_conv1d
from archscale_megatron.ops.cross_entropy import cross_entropy
from archscale_megatron.ops.gate import silu_gate
from archscale_megatron.ops.norm import norm
from archscale_megatron.ops.selective_scan import selective_scan

S, B, D, N = 96, 2, 8, 4  # tokens, batch, channels, state size


def leaf(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.rand(shape, dtype=dtype).neg_().requires_grad_()


def attend(dtype: torch.dtype = torch.bfloat16) -> tuple[Callable[..., Tensor], list[Tensor]]:
    inputs = [leaf(S, B, heads, D, dtype=dtype) for heads in (4, 2, 2)]
    return lambda q, k, v: attention(q, k, v, softmax_scale=0.3, window=16), inputs


def convolve(dtype: torch.dtype = torch.bfloat16) -> tuple[Callable[..., Tensor], list[Tensor]]:
    return causal_conv_of, [leaf(S, B, D, dtype=dtype), leaf(D, 1, 4, dtype=dtype), leaf(D, dtype=dtype)]


def causal_conv_of(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return causal_conv1d(x, weight, bias)


def scan(dtype: torch.dtype = torch.bfloat16) -> tuple[Callable[..., Tensor], list[Tensor]]:
    shapes = [(S, B, D), (S, B, D), (D, N), (S, B, N), (S, B, N), (D,), (D,)]
    fp32 = (2, 5, 6)
    return selective_scan, [leaf(*shape, dtype=torch.float32 if i in fp32 else dtype) for i, shape in enumerate(shapes)]


def norm_stream(dtype: torch.dtype = torch.bfloat16) -> tuple[Callable[..., Tensor], list[Tensor]]:
    return lambda x, weight: norm(x, weight, None, 1e-5)[0], [leaf(S, B, D, dtype=torch.float32), leaf(D, dtype=dtype)]


def gate(dtype: torch.dtype = torch.bfloat16) -> tuple[Callable[..., Tensor], list[Tensor]]:
    return silu_gate, [leaf(S, B, D, dtype=dtype), leaf(S, B, D, dtype=dtype)]


KEPT = {
    "norm": (norm_stream, 4 * S * B),  # a fp32 number a token
    "gate": (gate, 0),
    # the output, and a fp32 number a head and token
    "attention": (attend, 2 * S * B * 4 * D + 4 * S * B * 4),
    "convolution": (convolve, 0),
    "scan": (scan, 4 * B * D * N * (S // 32)),  # the fp32 states every 32 tokens
}


@pytest.mark.parametrize("name", KEPT)
def test_stand_in_keeps_what_the_kernel_keeps(name: str) -> None:
    """Besides its inputs."""
    build, kept = KEPT[name]
    operation, inputs = build()
    expected = operation(*inputs)
    with fused_kernels(), Recorder({}) as recorder:
        output = operation(*inputs)
        assert (output.shape, output.dtype) == (expected.shape, expected.dtype)
        loss = output.sum()
        del output
        assert recorder.live == kept + loss.nbytes
        loss.backward()
    for x in inputs:
        assert x.grad is not None and x.grad.shape == x.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_loss_keeps_three_numbers_a_token(dtype: torch.dtype) -> None:
    """The maximum, the sum of exponentials and one beside it, fp32; the gradient takes the place of the logits."""
    logits, labels = leaf(S, B, 64, dtype=dtype), torch.zeros(S, B, dtype=torch.int64)
    with fused_kernels(), Recorder({}) as recorder:
        losses = cross_entropy(logits, labels, vocab_size=60, label_smoothing=0.1)
        assert losses is not None and (losses.shape, losses.dtype) == ((S, B), torch.float32)
        assert recorder.live == 3 * 4 * S * B + losses.nbytes
        (gradient,) = torch.autograd.grad(losses.sum(), logits)
        assert (gradient.shape, gradient.data_ptr()) == (logits.shape, logits.data_ptr())


@pytest.mark.parametrize("build", [attend, convolve])
def test_fp32_has_no_fused_kernel(build: Callable) -> None:
    operation, inputs = build(torch.float32)
    expected = operation(*inputs)
    with fused_kernels():
        torch.testing.assert_close(operation(*inputs), expected, rtol=0, atol=0)


def test_ops_are_themselves_again() -> None:
    operation, inputs = scan()
    expected = operation(*inputs)
    with pytest.raises(RuntimeError, match="stop"), fused_kernels():
        raise RuntimeError("stop")
    torch.testing.assert_close(operation(*inputs), expected, rtol=0, atol=0)
