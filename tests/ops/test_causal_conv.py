"""causal_conv1d against a float64 loop over tokens and taps: outputs, gradients, documents."""

import pytest
import torch

from archscale_megatron.ops.causal_conv import causal_conv1d


def reference(x, weight, bias, document_starts=None, activation="silu"):
    s, b, _ = x.shape
    k = weight.shape[-1]
    rows = []
    for row in range(b):
        outputs, begin = [], 0
        for t in range(s):
            if document_starts is not None and document_starts[t, row]:
                begin = t
            y = torch.zeros_like(x[0, 0]) if bias is None else bias
            for j in range(k):
                if t - j >= begin:
                    y = y + weight[:, 0, k - 1 - j] * x[t - j, row]
            outputs.append(y * torch.sigmoid(y) if activation == "silu" else y)
        rows.append(torch.stack(outputs))
    return torch.stack(rows, 1)


def inputs(s, b, d, k, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(s + k)
    shapes = (s, b, d), (d, 1, k), (d,), (s, b, d)
    x, weight, bias, grad = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    return [x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()], grad


def starts_of(s: int) -> torch.Tensor:
    """Documents shorter than the kernel, of length 1, and other boundaries in each row."""
    starts = torch.zeros(s, 2, dtype=torch.bool)
    starts[[0, 1, 2, 4, 7, 20, s - 1], 0] = True
    starts[[3, 11], 1] = True
    return starts


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


def assert_matches_reference(leaves, grad, tolerance=1e-5, **options):
    exact = [None if x is None else x.detach().double().requires_grad_() for x in leaves]
    actual, expected = causal_conv1d(*leaves, **options), reference(*exact, **options)
    assert actual.dtype == leaves[0].dtype and actual.shape == leaves[0].shape
    assert difference(actual, expected) < tolerance
    actual_grads = torch.autograd.grad(actual, [x for x in leaves if x is not None], grad)
    expected_grads = torch.autograd.grad(expected, [x for x in exact if x is not None], grad.double())
    for a, e in zip(actual_grads, expected_grads, strict=True):
        assert difference(a, e) < tolerance


@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_matches_a_loop(k, activation, with_documents) -> None:
    starts = starts_of(30) if with_documents else None
    assert_matches_reference(*inputs(30, 2, 6, k), activation=activation, document_starts=starts)


@pytest.mark.parametrize("s", [1, 3])
def test_sequence_shorter_than_the_kernel(s) -> None:
    assert_matches_reference(*inputs(s, 2, 6, 4))


def test_no_bias() -> None:
    (x, weight, _), grad = inputs(30, 2, 6, 4)
    assert_matches_reference([x, weight, None], grad, document_starts=starts_of(30))


def test_bf16_is_rounded_once() -> None:
    # Sums are fp32: the output is off by one rounding to bf16, at most 2^-8 of its value.
    leaves, grad = inputs(30, 2, 6, 4, torch.bfloat16)
    actual, expected = causal_conv1d(*leaves), reference(*(x.double() for x in leaves))
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.double(), expected, rtol=2**-8 * 1.01, atol=1e-6)
    assert_matches_reference(leaves, grad, tolerance=2**-8, document_starts=starts_of(30))


def test_every_document_equals_itself_alone() -> None:
    leaves, _ = inputs(30, 2, 6, 4)
    x, weight, bias = leaves
    starts = starts_of(30)
    packed = causal_conv1d(x, weight, bias, document_starts=starts)
    for row in range(2):
        bounds = sorted({0, 30, *starts[:, row].nonzero().flatten().tolist()})
        for begin, end in zip(bounds, bounds[1:], strict=False):
            alone = causal_conv1d(x[begin:end, row : row + 1], weight, bias)
            torch.testing.assert_close(packed[begin:end, row : row + 1], alone, rtol=1e-6, atol=1e-6)


def test_nan_stays_in_its_document() -> None:
    (x, weight, bias), _ = inputs(30, 2, 6, 4)
    x = x.detach().clone()
    x[3, 0] = float("nan")
    y = causal_conv1d(x, weight, bias, document_starts=starts_of(30))
    assert y[4:].isfinite().all()


def test_wrong_arguments_are_refused() -> None:
    (x, weight, bias), _ = inputs(6, 2, 4, 3)
    starts = torch.zeros(6, 2, dtype=torch.bool)
    for arguments, options, message in [
        ((x, weight[:3], bias), {}, "give x"),
        ((x, weight.squeeze(1), bias), {}, "give x"),
        ((x, weight, bias[:3]), {}, "give x"),
        ((x[0], weight, bias), {}, "give x"),
        ((x, weight, bias), {"activation": "relu"}, "'silu' or None"),
        ((x, weight, bias), {"document_starts": starts.t()}, "document_starts"),
    ]:
        with pytest.raises(ValueError, match=message):
            causal_conv1d(*arguments, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("with_documents", [False, True])
def test_cuda_kernel_equals_the_loop(dtype, tolerance, with_documents) -> None:
    pytest.importorskip("causal_conv1d")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    leaves, grad = inputs(30, 2, 64, 4, dtype, "cuda")
    assert_matches_reference(leaves, grad, tolerance, document_starts=starts_of(30).cuda() if with_documents else None)
