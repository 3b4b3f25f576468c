"""Weight gradients that a matrix product adds to their fp32 sum itself, in the place of Apex's extension for it.

The names and arguments are those of `fused_weight_gradient_mlp_cuda`, which Megatron's linears call with
`--gradient-accumulation-fusion`. Without it, each micro-batch writes a bf16 gradient, rounded, and reads it again.
"""

from __future__ import annotations

import torch
from torch import Tensor


def wgrad_gemm_accum_fp32(inputs: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    """main_grad [o, i] += grad_output^T inputs, summed and added in fp32.

    Args:
        inputs: [tokens, i]; bf16, fp16 or fp32.
        grad_output: [tokens, o], of the same dtype.
        main_grad: fp32.
    """
    if inputs.dtype == main_grad.dtype:
        main_grad.addmm_(grad_output.t(), inputs)
    else:
        torch.ops.aten.addmm.dtype_out(main_grad, grad_output.t(), inputs, torch.float32, out=main_grad)


def wgrad_gemm_accum_fp16(inputs: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    """The same with all three in one half precision."""
    main_grad.addmm_(grad_output.t(), inputs)


def available(device: torch.device) -> bool:
    """Whether this torch can do it on `device`: tried, since it is for some GPUs and libraries alone."""
    tokens, sums = torch.ones(32, 16, dtype=torch.bfloat16, device=device), torch.ones(16, 16, device=device)
    try:
        wgrad_gemm_accum_fp32(tokens, tokens, sums)
    except (NotImplementedError, RuntimeError):
        return False
    return bool((sums == 33).all())
