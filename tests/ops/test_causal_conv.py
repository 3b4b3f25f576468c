"""causal_conv1d against a float64 loop over tokens and taps: outputs, gradients, documents.

Run as a script, this file checks the Triton kernels in Triton's interpreter, which must be chosen before Triton is
imported.
"""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from archscale_megatron.ops import causal_conv as module
from archscale_megatron.ops.causal_conv import causal_conv1d

ROOT = Path(__file__).parents[2]


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


def strided(x, width):
    """x as the first channels of a projection `width` wide, from its second channel on."""
    s, b, d = x.shape
    whole = torch.zeros(s, b, width, dtype=x.dtype, device=x.device)
    whole[..., 1 : d + 1] = x.detach()
    return whole[..., 1 : d + 1].requires_grad_()


def starts_of(s: int) -> torch.Tensor:
    """Documents shorter than the kernel, of length 1, and other boundaries in each row."""
    starts = torch.zeros(s, 2, dtype=torch.bool)
    starts[[0, 1, 2, 4, 7, 20, s - 1], 0] = True
    starts[[3, 11], 1] = True
    return starts


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.cpu().double() - expected).abs().max() / expected.abs().max()).item()


def assert_matches_reference(leaves, grad, tolerance=1e-5, operation=causal_conv1d, **options):
    exact = [None if x is None else x.detach().cpu().double().requires_grad_() for x in leaves]
    actual, expected = operation(*leaves, **options), reference(*exact, **options)
    assert actual.dtype == leaves[0].dtype and actual.shape == leaves[0].shape
    assert difference(actual, expected) < tolerance
    actual_grads = torch.autograd.grad(actual, [x for x in leaves if x is not None], grad)
    expected_grads = torch.autograd.grad(expected, [x for x in exact if x is not None], grad.cpu().double())
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


def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, activation=None):
    """The package's conditions (csrc/causal_conv1d.cpp), and its result."""
    batch, d, s = x.shape
    assert weight.shape[0] == d and 2 <= weight.shape[1] <= 4 and (bias is None or bias.dtype == weight.dtype)
    assert x.stride(1) == 1 and d % 8 == 0 and x.stride(0) % 8 == x.stride(2) % 8 == x.storage_offset() % 8 == 0
    starts = None
    if seq_idx is not None:
        assert seq_idx.dtype == torch.int32 and seq_idx.shape == (batch, s) and seq_idx.is_contiguous()
        starts = torch.nn.functional.pad(seq_idx.diff() != 0, (1, 0), value=True).t()
    y = module._torch(x.permute(2, 0, 1), weight.unsqueeze(1), bias, starts, activation)
    return y.permute(1, 2, 0)


@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("width", [16, 17, 32, 100])
def test_the_package_gets_rows_that_it_can_read(monkeypatch, width, with_documents) -> None:
    package = types.ModuleType("causal_conv1d")
    package.causal_conv1d_fn = causal_conv1d_fn
    monkeypatch.setitem(sys.modules, "causal_conv1d", package)
    (x, weight, bias), grad = inputs(30, 2, 16, 4)
    x = x if width == 16 else strided(x, width)
    package_of = lambda *args, document_starts=None: module._package(*args, document_starts, "silu")  # noqa: E731
    starts = starts_of(30) if with_documents else None
    assert_matches_reference([x, weight, bias], grad, operation=package_of, document_starts=starts)


def test_choice_of_kernel(monkeypatch) -> None:
    def chosen(installed, d=16, k=4, dtype=torch.bfloat16, device="cuda"):
        x = types.SimpleNamespace(dtype=dtype, is_cuda=device == "cuda", shape=(30, 2, d))
        monkeypatch.setattr(module, "optional", lambda name: name in installed)
        return module._kernel(x, torch.empty(d, 1, k)).__name__.strip("_")

    both = ("causal_conv1d", "triton")
    assert chosen(both) == chosen(["causal_conv1d"]) == "package"
    assert chosen(both, d=12) == chosen(both, k=5) == chosen(both, k=1) == chosen(["triton"]) == "triton"
    assert chosen([]) == chosen(["causal_conv1d"], d=12) == "torch"
    assert chosen(both, device="cpu") == chosen(both, dtype=torch.float64) == "torch"
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert chosen(both) == "triton"


def triton(x, weight, bias, document_starts=None, activation="silu"):
    from archscale_megatron.ops.causal_conv_triton import causal_conv1d_triton

    return causal_conv1d_triton(x, weight, bias, document_starts, activation)


def test_triton_interpreted() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, __file__], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("all right\n")


def check_triton_in_interpreter() -> None:
    from archscale_megatron.ops import causal_conv_triton

    causal_conv_triton.STEPS, causal_conv_triton.UNROLL = 8, 4  # several walks, several rounds in each
    starts = starts_of(30)
    for d, k, activation, document_starts in [
        (6, 4, "silu", starts), (6, 1, "silu", None), (130, 4, None, None), (3, 2, None, starts),
        (6, 7, "silu", starts), (6, 11, "silu", None),
    ]:  # fmt: skip
        leaves, grad = inputs(30, 2, d, k)
        options = {"activation": activation, "document_starts": document_starts}
        assert_matches_reference(leaves, grad, operation=triton, **options)
    for at in range(6, 19):  # documents that start about where walks do, the last of which ends with the sequence
        around = torch.zeros(24, 2, dtype=torch.bool)
        around[at, 0] = around[[at, at + 2], 1] = True
        assert_matches_reference(*inputs(24, 2, 6, 4), operation=triton, document_starts=around)
    (x, weight, _), grad = inputs(30, 2, 6, 4)
    noise = strided(grad, 9).detach()
    assert_matches_reference([strided(x, 11), weight, None], noise, operation=triton, document_starts=starts)
    assert_matches_reference(*inputs(3, 2, 6, 4), operation=triton)
    # The interpreter cuts off what does not fit into bf16: twice the error of rounding.
    assert_matches_reference(*inputs(30, 2, 6, 4, torch.bfloat16), 2**-7, triton, document_starts=starts)
    x = inputs(30, 2, 6, 4)[0][0].detach().clone()
    x[3, 0] = float("nan")
    assert triton(x, weight, None, starts)[4:].isfinite().all()
    print("all right")


@pytest.mark.parametrize("backend, arch, warp_size", [("cuda", 90, 32), ("hip", "gfx942", 64)])
def test_triton_compiles_without_gpu(backend, arch, warp_size, tmp_path, monkeypatch) -> None:
    """Down to the binaries of an H100 and an MI300X: what the interpreter accepts may not compile."""
    import triton
    from triton.backends.compiler import GPUTarget

    from archscale_megatron.ops import causal_conv_triton as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    blocks = {"TAPS": 4, "BLOCK": kernels.BLOCK, "STEPS": kernels.STEPS, "UNROLL": kernels.UNROLL, "ALIGNED": 8}
    for kernel in (kernels._conv_forward_kernel, kernels._conv_backward_kernel):
        # Triton makes an argument that is 1 or None a constant, which compiles differently.
        for given in ({"SILU": True}, {"SILU": False, "bias": None, "starts": None, "batch": 1, "length": 1}):
            constants = {n: v for n, v in (blocks | given).items() if n in kernel.arg_names}
            types_ = {"starts": "*i8", "grads": "*fp32"} | dict.fromkeys(
                ("x", "weight", "bias", "y", "dy", "grad_x"), "*bf16"
            )
            types_ |= dict.fromkeys(constants, "constexpr")
            signature = {name: types_.get(name, "i32") for name in kernel.arg_names}
            source = triton.compiler.ASTSource(kernel, signature, constants)
            compiled = triton.compile(source, target=GPUTarget(backend, arch, warp_size))
            assert compiled.asm["cubin" if backend == "cuda" else "hsaco"]


@pytest.fixture(params=["causal_conv1d", "triton"])
def kernel(request, monkeypatch) -> str:
    """What computes on the GPU."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if module.optional(request.param) is None:
        pytest.skip(f"no package {request.param} that loads")
    monkeypatch.setattr(module, "optional", lambda name: name == request.param)
    return request.param


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("width", [64, 65, 128])
def test_gpu_kernel_equals_the_loop(kernel, dtype, tolerance, with_documents, width) -> None:
    (x, weight, bias), grad = inputs(300, 2, 64, 4, dtype, "cuda")
    x = x if width == 64 else strided(x, width)
    starts = starts_of(300).cuda() if with_documents else None
    assert_matches_reference([x, weight, bias], grad, tolerance, document_starts=starts)


@pytest.mark.gpu
@pytest.mark.parametrize("d, k, activation", [(100, 4, "silu"), (12, 2, None), (130, 5, "silu")])
def test_triton_on_gpu_serves_what_the_package_does_not(kernel, d, k, activation) -> None:
    if kernel != "triton":
        pytest.skip("Triton alone")
    (x, weight, _), grad = inputs(150, 2, d, k, device="cuda")
    assert_matches_reference([x, weight, None], grad, activation=activation, document_starts=starts_of(150).cuda())


@pytest.mark.gpu
def test_triton_on_gpu_repeats_exactly() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    leaves, grad = inputs(1000, 2, 300, 4, torch.bfloat16, "cuda")
    first, second = ([y := triton(*leaves), *torch.autograd.grad(y, leaves, grad)] for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert a.equal(b)


if __name__ == "__main__":
    check_triton_in_interpreter()
