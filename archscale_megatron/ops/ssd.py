"""Mamba-2's scan, "state space duality" (arXiv 2405.21060, section 6), behind one function."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from archscale_megatron.ops.chunked import chunk_decay, scan_chunks
from archscale_megatron.ops.documents import check_document_starts, document_ids_by_row
from archscale_megatron.ops.packages import optional


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    *,
    dt_bias: Tensor,
    document_starts: Tensor | None = None,
    chunk_size: int = 128,
) -> Tensor:
    """Scan a sequence with one decay a head, without the z gate (a GMU needs the ungated output).

    For every head, with delta_t = softplus(dt_t + dt_bias) and a state h [n, p] that starts at zero:

        h_t = exp(delta_t A) h_{t-1} + B_t (delta_t x_t)^T
        y_t = h_t^T C_t + D x_t

    All maths is in fp32 (float64 if x is); mamba_ssm, where it is installed and x is bf16 on a GPU, multiplies matrices
    in bf16.

    Args:
        x: [s, b, h, p] input of h heads; fp32, bf16 or float64.
        dt: [s, b, h] step sizes before bias and softplus.
        A: [h] fp32, negative.
        B: [s, b, n] input map, shared by the heads.
        C: [s, b, n] output map, shared by the heads.
        D: [h] fp32 skip weights.
        dt_bias: [h] fp32, added to dt.
        document_starts: bool [s, b], True at a document's first token: no earlier state reaches it.
        chunk_size: steps that are computed as one matrix product.

    Returns:
        y [s, b, h, p] in the dtype of x.

    Raises:
        ValueError: shapes that do not fit, or document_starts that is not bool [s, b].
    """
    _check_arguments(x, dt, A, B, C, D, dt_bias, document_starts)
    # In fp32 it would multiply in TF32, too coarsely for who asks for fp32.
    if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and optional("mamba_ssm"):
        return _mamba_ssm(x, dt, A, B, C, D, dt_bias, document_starts, chunk_size)
    with torch.autocast(x.device.type, enabled=False):
        dtype = torch.promote_types(x.dtype, torch.float32)
        state = torch.zeros(x.shape[1], x.shape[2], B.shape[2], x.shape[3], dtype=dtype, device=x.device)
        step = partial(_step, A=A.to(dtype), D=D.to(dtype), dt_bias=dt_bias.to(dtype))
        return scan_chunks(step, state, (x, dt, B, C), document_starts, chunk_size)


def _step(
    state: Tensor,
    ids: Tensor | None,
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
) -> tuple[Tensor, Tensor]:
    """A chunk of q steps, `state` [b, h, n, p]."""
    dtype = state.dtype
    delta = F.softplus(dt.to(dtype) + dt_bias)
    decay_BHQK = chunk_decay((delta * A).permute(1, 2, 0), ids)
    of_state, of_steps = decay_BHQK[..., :1], decay_BHQK[..., 1:]
    x_BHQP = x.to(dtype).permute(1, 2, 0, 3)
    drive = delta.permute(1, 2, 0).unsqueeze(-1) * x_BHQP
    B_BQN, C_BQN = (v.to(dtype).transpose(0, 1).unsqueeze(1) for v in (B, C))

    y = (C_BQN @ B_BQN.mT * of_steps) @ drive + (C_BQN @ state) * of_state + D[:, None, None] * x_BHQP
    state = of_state[..., -1:, :] * state + B_BQN.mT @ (of_steps[..., -1, :, None] * drive)
    return y.permute(2, 0, 1, 3).to(x.dtype), state


def _mamba_ssm(x, dt, A, B, C, D, dt_bias, document_starts, chunk_size):
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    x_BSHP, dt_BSH, B_BSN, C_BSN = (v.to(x.dtype).transpose(0, 1) for v in (x, dt, B, C))
    y_BSHP = mamba_chunk_scan_combined(
        x_BSHP,
        dt_BSH,
        A,
        B_BSN.unsqueeze(2),  # one group
        C_BSN.unsqueeze(2),
        chunk_size,
        D=D,
        dt_bias=dt_bias,
        dt_softplus=True,
        seq_idx=None if document_starts is None else document_ids_by_row(document_starts),
    )
    return y_BSHP.transpose(0, 1)


def _check_arguments(x, dt, A, B, C, D, dt_bias, document_starts) -> None:
    if x.dim() != 4 or x.numel() == 0 or B.dim() != 3:
        raise ValueError(f"ssd needs x [s, b, h, p], not empty, and B [s, b, n], not {list(x.shape)}, {list(B.shape)}")
    (s, b, h, _), n = x.shape, B.shape[2]
    expected = {
        "dt": (dt, (s, b, h)),
        "A": (A, (h,)),
        "B": (B, (s, b, n)),
        "C": (C, (s, b, n)),
        "D": (D, (h,)),
        "dt_bias": (dt_bias, (h,)),
    }
    for name, (value, shape) in expected.items():
        if value.shape != shape:
            raise ValueError(f"ssd: {name} is {list(value.shape)}; it must be {list(shape)} for x {list(x.shape)}")
    if document_starts is not None:
        check_document_starts(document_starts, s, b)
