"""The recurrence of Gated DeltaNet (arXiv 2412.06464) behind one function."""

import functools
import importlib.metadata
import warnings

import torch
from packaging.version import Version
from torch import Tensor

from archscale_megatron.ops.chunked import chunk_decay, scan_chunks
from archscale_megatron.ops.documents import check_document_starts, cumulative_lengths
from archscale_megatron.ops.packages import optional

CHUNK_SIZE = 64
NORM_EPSILON = 1e-6  # FLA's


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *, document_starts: Tensor | None = None
) -> Tensor:
    """Write values under keys into a matrix that decays, each key's old value replaced in part, and read it.

    For every head, with q and k divided by sqrt(|.|^2 + 1e-6), q by sqrt(dk) too, and S [dv, dk] that starts at zero:

        S_t = exp(g_t) S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T
        o_t = S_t q_t

    All maths is in fp32 (float64 if q is); FLA, where it is installed and bf16 tensors are on a GPU, multiplies
    matrices in bf16.

    Args:
        q, k: [s, b, h, dk] queries and keys; fp32, bf16 or float64.
        v: [s, b, h, dv] values.
        g: [s, b, h] logarithm of the decay, fp32, not positive.
        beta: [s, b, h] how much of a key's old value is replaced, from 0 to 2 (arXiv 2411.12537).
        document_starts: bool [s, b], True at a document's first token: no earlier state reaches it.

    Returns:
        o [s, b, h, dv] in the dtype of v.

    Raises:
        ValueError: shapes that do not fit, or document_starts that is not bool [s, b].
    """
    _check_arguments(q, k, v, g, beta, document_starts)
    # FLA refuses fp32.
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and _fla_serves(q.device):
        return _fla(q, k, v, g, beta, document_starts)
    with torch.autocast(q.device.type, enabled=False):
        dtype = torch.promote_types(q.dtype, torch.float32)
        state = torch.zeros(*q.shape[1:], v.shape[3], dtype=dtype, device=q.device)
        return scan_chunks(_step, state, (q, k, v, g, beta), document_starts, CHUNK_SIZE)


def _step(
    state: Tensor, ids: Tensor | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor]:
    """A chunk of q steps, `state` = S^T [b, h, dk, dv].

    With u_t = beta_t (v_t - exp(g_t) S_{t-1} k_t), what step t really adds, S_t = exp(g_t) S_{t-1} + u_t k_t^T: a
    sum of what is left of earlier u's. So the u's of a chunk solve a triangular system ("WY representation",
    arXiv 2406.06484).
    """
    q, k, v_BHQV, g, beta = (x.to(state.dtype).movedim(0, 2) for x in (q, k, v, g, beta))
    q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + NORM_EPSILON) for x in (q, k))
    q = q * q.shape[-1] ** -0.5
    decay_BHQK = chunk_decay(g, ids)
    of_state, of_steps = decay_BHQK[..., :1], decay_BHQK[..., 1:]

    beta = beta.unsqueeze(-1)
    replaced = (beta * of_steps * (k @ k.mT)).tril(-1)  # the solver takes the diagonal for ones
    u = torch.linalg.solve_triangular(
        replaced, beta * (v_BHQV - of_state * (k @ state)), upper=False, unitriangular=True
    )
    o = (of_steps * (q @ k.mT)) @ u + of_state * (q @ state)
    state = of_state[..., -1:, :] * state + (of_steps[..., -1, :, None] * k).mT @ u
    return o.movedim(2, 0).to(v.dtype), state


@functools.cache
def _fla_serves(device: torch.device) -> bool:
    """Whether FLA is there and right: compiled by Triton 3.4 to 3.7.0 for Hopper, its gradients of beta and g are wrong
    (issue 640 of flash-linear-attention)."""
    if optional("fla") is None:
        return False
    release = Version(importlib.metadata.version("triton"))
    if torch.cuda.get_device_capability(device)[0] == 9 and Version("3.4") <= release < Version("3.7.1"):
        warnings.warn(
            f"flash-linear-attention has wrong gradients on this GPU with Triton {release}: gated delta nets do "
            "without, slowly; Triton 3.7.1 or later is right",
            stacklevel=2,
        )
        return False
    return True


def _fla(q, k, v, g, beta, document_starts):
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    q, k, v, g, beta = (x.transpose(0, 1) for x in (q, k, v, g.float(), beta.to(q.dtype)))
    shape, cu_seqlens = v.shape, None
    if document_starts is not None:  # the rows of the batch end to end
        cu_seqlens = cumulative_lengths(document_starts, torch.int64)
        q, k, v, g, beta = (x.flatten(0, 1).unsqueeze(0) for x in (q, k, v, g, beta))
    o, _ = chunk_gated_delta_rule(q, k, v, g, beta, use_qk_l2norm_in_kernel=True, cu_seqlens=cu_seqlens)
    return o.reshape(shape).transpose(0, 1)


def _check_arguments(q, k, v, g, beta, document_starts) -> None:
    if q.dim() != 4 or q.numel() == 0 or v.dim() != 4:
        raise ValueError(
            "gated_delta_rule needs q [s, b, h, dk], not empty, and v [s, b, h, dv], not "
            f"{list(q.shape)}, {list(v.shape)}"
        )
    s, b, h, _ = q.shape
    expected = {"k": (k, q.shape), "v": (v, (s, b, h, v.shape[3])), "g": (g, (s, b, h)), "beta": (beta, (s, b, h))}
    for name, (value, shape) in expected.items():
        if value.shape != shape:
            raise ValueError(
                f"gated_delta_rule: {name} is {list(value.shape)}; it must be {list(shape)} for q {list(q.shape)}"
            )
    if document_starts is not None:
        check_document_starts(document_starts, s, b)
