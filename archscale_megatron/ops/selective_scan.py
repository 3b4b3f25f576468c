"""The selective scan of Mamba-1 (arXiv 2312.00752, algorithm 2) behind one function, whatever computes it."""

import os

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from archscale_megatron.ops.packages import optional
from archscale_megatron.ops.selective_scan_torch import scan_backward, scan_forward


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor | None = None,
    document_starts: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Scan a sequence with input-dependent steps, without the z gate (a GMU needs the ungated output).

    For every channel, with delta_t = softplus(dt_t + dt_bias) and a state h of n numbers that starts at zero:

        h_t = exp(delta_t A) h_{t-1} + delta_t x_t B_t
        y_t = C_t . h_t + D x_t

    The state is fp32 (float64 if x is), and so is all maths on it. Results are the same from run to run,
    except with `mamba_ssm`, whose backward pass adds atomically.

    Args:
        x: [s, b, d] input; fp32, bf16 or float64 (the last for `torch` only).
        dt: [s, b, d] step sizes before bias and softplus.
        A: [d, n] fp32, negative.
        B: [s, b, n] input map, shared by the channels.
        C: [s, b, n] output map, shared by the channels.
        D: [d] fp32 skip weights.
        dt_bias: [d] fp32, added to dt.
        document_starts: [s, b] bool, True at a document's first token: no earlier state reaches it.
        backend: `triton` (any GPU), `mamba_ssm` (CUDA, no document starts) or `torch`. By default the first
            of them that serves the given tensors on a GPU, `torch` on a CPU.

    Returns:
        y [s, b, d] in the dtype of x.

    Raises:
        ValueError: shapes that do not fit, or a backend that is unknown or cannot run here.
    """
    _check_shapes(x, dt, A, B, C, D, dt_bias, document_starts)
    usable = _usable_backends(x, document_starts is not None)
    backend = backend or usable[0]
    if backend not in usable:
        starts = "without" if document_starts is None else "with"
        raise ValueError(
            f"selective_scan backend {backend!r} cannot serve {x.dtype} {x.device.type} tensors {starts} "
            f"document starts here; use one of: {', '.join(usable)}"
        )
    if backend == "mamba_ssm":
        return _mamba_ssm_scan(x, dt, A, B, C, D, dt_bias)
    if backend == "triton":
        from archscale_megatron.ops import selective_scan_triton

        return selective_scan_triton.scan(x, dt, A, B, C, D, dt_bias, document_starts)
    return _TorchScan.apply(x, dt, A, B, C, D, dt_bias, document_starts)


class _TorchScan(torch.autograd.Function):
    """`selective_scan_torch` with step sizes, dtypes and saved tensors."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, dt_bias, starts):
        with torch.autocast(x.device.type, enabled=False):
            dtype = _state_dtype(x)
            delta = F.softplus(_biased(dt, dt_bias, dtype))
            y, states = scan_forward(x, delta, A.to(dtype), B, C, D.to(dtype), starts)
        ctx.save_for_backward(x, dt, A, B, C, D, dt_bias, starts, states)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, dt, A, B, C, D, dt_bias, starts, states = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            dtype = _state_dtype(x)
            biased = _biased(dt, dt_bias, dtype)
            inputs = (x, F.softplus(biased), A.to(dtype), B, C, D.to(dtype), starts)
            grad_x, grad_delta, *grads = scan_backward(dy, *inputs, states)
            grad_dt = grad_delta.mul_(torch.sigmoid(biased))
            grad_bias = None if dt_bias is None else grad_dt.sum((0, 1)).to(dt_bias.dtype)
        grads = [g.to(v.dtype) for g, v in zip((grad_x, grad_dt, *grads), (x, dt, A, B, C, D), strict=True)]
        return *grads, grad_bias, None


def _state_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _biased(dt: Tensor, dt_bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return dt.to(dtype) if dt_bias is None else dt.to(dtype) + dt_bias.to(dtype)


def _mamba_ssm_scan(x, dt, A, B, C, D, dt_bias):
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    x_BDS, dt_BDS, B_BNS, C_BNS = (v.to(x.dtype).permute(1, 2, 0) for v in (x, dt, B, C))
    y_BDS = selective_scan_fn(x_BDS, dt_BDS, A, B_BNS, C_BNS, D, delta_bias=dt_bias, delta_softplus=True)
    return y_BDS.permute(2, 0, 1)


def _usable_backends(x: Tensor, with_starts: bool) -> list[str]:
    """Legal backends, the default first."""
    if x.dtype == torch.float64:
        return ["torch"]
    if x.device.type == "cuda":
        mamba_ssm = not with_starts and optional("mamba_ssm") is not None
        return ["triton"] * (optional("triton") is not None) + ["mamba_ssm"] * mamba_ssm + ["torch"]
    # Triton's interpreter, for tests.
    return ["torch"] + ["triton"] * (os.environ.get("TRITON_INTERPRET") == "1" and optional("triton") is not None)


def _check_shapes(x, dt, A, B, C, D, dt_bias, document_starts) -> None:
    if x.dim() != 3 or x.numel() == 0 or A.dim() != 2:
        raise ValueError(
            f"selective_scan needs x [s, b, d], not empty, and A [d, n], not {list(x.shape)}, {list(A.shape)}"
        )
    (s, b, d), n = x.shape, A.shape[1]
    expected = {
        "dt": (dt, (s, b, d)),
        "A": (A, (d, n)),
        "B": (B, (s, b, n)),
        "C": (C, (s, b, n)),
        "D": (D, (d,)),
        "dt_bias": (dt_bias, (d,)),
        "document_starts": (document_starts, (s, b)),
    }
    for name, (value, shape) in expected.items():
        if value is not None and value.shape != shape:
            raise ValueError(
                f"selective_scan: {name} is {list(value.shape)}; it must be {list(shape)} for x {[s, b, d]}"
            )
