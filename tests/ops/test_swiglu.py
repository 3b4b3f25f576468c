"""SwiGLU against its formula, and its gradient against differences and autograd."""

import pytest
import torch
from torch.nn import functional as F

from archscale_megatron.ops.swiglu import swiglu


def composite(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_autograd_bit_for_bit(dtype):
    torch.manual_seed(0)
    x = torch.randn(5, 3, 16, dtype=dtype, requires_grad=True)
    weight = torch.randn(5, 3, 8, dtype=dtype)
    y, expected = swiglu(x), composite(x)
    assert torch.equal(y, expected)
    (grad,), (expected_grad,) = (torch.autograd.grad(out, x, weight) for out in (y, expected))
    assert torch.equal(grad, expected_grad)


def test_formula_and_gradient():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    gate, up = x[..., :4], x[..., 4:]
    torch.testing.assert_close(swiglu(x), gate / (1 + torch.exp(-gate)) * up, rtol=1e-14, atol=0)
    assert torch.autograd.gradcheck(swiglu, x)


def test_input_that_is_not_contiguous():
    torch.manual_seed(0)
    x = torch.randn(3, 5, 16, requires_grad=True)
    weight = torch.randn(5, 3, 8).transpose(0, 1)
    grads = [torch.autograd.grad(f(x.transpose(0, 1)), x, weight.transpose(0, 1))[0] for f in (swiglu, composite)]
    assert torch.equal(*grads)
