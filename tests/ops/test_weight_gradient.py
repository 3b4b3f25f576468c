"""Weight gradients added to fp32 sums, against float64."""

import pytest
import torch

from archscale_megatron.ops import weight_gradient


def compare(device: str, dtype: torch.dtype) -> None:
    """To the rounding of fp32 sums: what is multiplied is the same."""
    generator = torch.Generator().manual_seed(0)
    inputs, grad = (torch.randn(1000, n, generator=generator).to(device, dtype) for n in (24, 40))
    before = torch.randn(40, 24, generator=generator).to(device)
    found = before.clone()
    weight_gradient.wgrad_gemm_accum_fp32(inputs, grad, found)
    expected = before.double() + grad.double().t() @ inputs.double()
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_fp32() -> None:
    compare("cpu", torch.float32)


def test_one_half_precision() -> None:
    inputs, grad = torch.ones(8, 3, dtype=torch.bfloat16), torch.full((8, 2), 2, dtype=torch.bfloat16)
    sums = torch.ones(2, 3, dtype=torch.bfloat16)
    weight_gradient.wgrad_gemm_accum_fp16(inputs, grad, sums)
    assert sums.eq(17).all()


def test_where_torch_cannot() -> None:
    """On a CPU it has no product of halves into fp32."""
    assert not weight_gradient.available(torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_gpu(dtype: torch.dtype) -> None:
    assert weight_gradient.available(torch.device("cuda"))
    compare("cuda", dtype)
