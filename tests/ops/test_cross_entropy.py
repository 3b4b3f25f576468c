"""Cross entropy of logits in Triton against the formula in float64: values, gradients, tensor-parallel ranks.

As a program, this module checks the kernels in Triton's interpreter, which must be chosen before Triton is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from archscale_megatron.ops.cross_entropy import cross_entropy
from tests.launch import ROOT, torchrun

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Of gradients, relative to each: a result rounded to bf16 is off by up to 2^-8 of itself, to fp16 by up to 2^-11;
# Triton's interpreter cuts bf16 off.
TOLERANCES = {FP32: 1e-5, FP16: 2**-11 + 1e-5, BF16: 2**-8 + 1e-5}
CUT_OFF = TOLERANCES | {BF16: 2**-7 + 1e-5}
SMALL = 1e-6  # absolute: left of a label's gradient where its probability is almost 1; the smallest numbers of fp16

# name: tokens, columns, entries without padding, what is added to logits of standard deviation `scale`
CASES: dict[str, tuple[tuple[int, ...], int, int, float, float]] = {
    "even": ((5, 3), 64, 64, 0, 1),
    "padded": ((5, 3), 128, 90, 0, 1),
    "odd": ((7,), 91, 91, 0, 3),
    "one_column": ((2, 2), 1, 1, 0, 1),
    "half_a_vector": ((3, 2), 4, 3, 0, 1),
    "several_blocks": ((2, 1), 20_000, 19_990, 0, 1),
    "blocks_of_single_columns": ((1, 2), 2_501, 2_500, 0, 1),
    "huge": ((5, 3), 64, 60, -3e4, 1e4),
}


def inputs(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """logits [..., columns], labels (the first and the last entry among them) and the gradient of the losses [...]."""
    shape, columns, vocab_size, offset, scale = CASES[name]
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(*shape, columns, generator=generator) * scale + offset
    labels = torch.randint(vocab_size, shape, generator=generator)
    labels.view(-1)[0], labels.view(-1)[-1] = 0, vocab_size - 1
    return logits.to(dtype), labels, torch.randn(shape, generator=generator)


def reference(logits: Tensor, labels: Tensor, grad: Tensor, vocab_size: int, smoothing: float) -> tuple[Tensor, Tensor]:
    """Losses and the gradient of the logits, float64."""
    logits = logits.detach().double().requires_grad_()
    log_p = logits - logits.detach().amax(-1, keepdim=True)
    log_p = log_p - log_p.exp().sum(-1, keepdim=True).log()
    nll = -log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    losses = (1 - smoothing) * nll - smoothing * log_p[..., :vocab_size].mean(-1)
    return losses.detach(), torch.autograd.grad(losses, logits, grad.double())[0]


def ours(logits: Tensor, labels: Tensor, grad: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """As `reference`; the logits are a copy, as they are written over."""
    logits = logits.clone().requires_grad_()
    losses = cross_entropy(logits, labels, **options)
    assert losses is not None, "no kernel serves"
    return losses.detach(), torch.autograd.grad(losses, logits, grad)[0]


def compare(
    found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], tolerances: dict[torch.dtype, float]
) -> None:
    (losses, gradient), dtype = found, found[1].dtype
    assert losses.dtype == FP32
    # Next to the largest: fp32 knows the logits no better, of which a loss is a difference.
    torch.testing.assert_close(losses.double(), expected[0], rtol=0, atol=1e-6 * (1 + expected[0].max().item()))
    torch.testing.assert_close(gradient.double(), expected[1], rtol=tolerances[dtype], atol=SMALL)


def check_case(name: str, smoothing: float, dtype: torch.dtype, device: str, tolerances: dict) -> None:
    vocab_size = CASES[name][2]
    given = [x.to(device) for x in inputs(name, dtype)]
    found = ours(*given, vocab_size=vocab_size, label_smoothing=smoothing)
    compare(found, reference(*given, vocab_size, smoothing), tolerances)


def run_here(*command: str, environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, *command], env=os.environ | environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_kernels_interpreted() -> None:
    run_here("-m", "tests.ops.test_cross_entropy", "alone", environment={"TRITON_INTERPRET": "1"})


def test_tensor_parallel_ranks_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    torchrun(2, "-m", "tests.ops.test_cross_entropy", "parallel")


def alone() -> None:
    for name in CASES:
        for dtype in (FP32, FP16, BF16):
            if name != "huge" or dtype != FP16:
                for smoothing in (0.0, 0.1):
                    check_case(name, smoothing, dtype, "cpu", CUT_OFF)
    check_layouts()
    check_repeated_backward()


def check_layouts() -> None:
    """Rows apart from one another, labels and gradients as transposing and `sum` leave them."""
    logits, labels, grad = inputs("padded", FP32)
    expected = reference(logits, labels, grad, 90, 0.1)
    apart = torch.cat([logits, logits], -1)[..., :128].requires_grad_()
    losses = cross_entropy(apart, labels.t().contiguous().t(), vocab_size=90, label_smoothing=0.1)
    assert losses is not None
    compare((losses.detach(), torch.autograd.grad(losses, apart, grad)[0]), expected, CUT_OFF)
    losses = cross_entropy(logits.requires_grad_(), labels, vocab_size=90)
    ones = reference(logits.clone(), labels, torch.ones(labels.shape), 90, 0.0)
    compare((losses.detach(), torch.autograd.grad(losses.sum(), logits)[0]), ones, CUT_OFF)


def check_repeated_backward() -> None:
    """The logits are gone after the first backward pass, of which whoever still needs them must hear."""
    logits, labels, _ = inputs("even", FP32)
    logits.requires_grad_()
    losses = cross_entropy(logits, labels, vocab_size=64)
    total = losses.sum() + logits.square().sum()
    gradient = torch.autograd.grad(losses.sum(), logits, retain_graph=True)[0]
    assert gradient.data_ptr() == logits.data_ptr()
    for again in (losses.sum(), total):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(again, logits, retain_graph=True)


def parallel() -> None:
    """Each rank has half of the columns; what it makes of them equals the whole reference's part."""
    dist.init_process_group("gloo")
    group, rank = dist.group.WORLD, dist.get_rank()
    for name in ("even", "padded", "half_a_vector", "huge"):
        columns, vocab_size = CASES[name][1:3]
        for entries in {vocab_size, min(vocab_size, columns // 2 - 1)}:  # also: a rank with nothing but padding
            for smoothing in (0.0, 0.1):
                logits, labels, grad = inputs(name, BF16)
                labels = labels.clamp(max=entries - 1)
                losses, gradient = reference(logits, labels, grad, entries, smoothing)
                local = logits.chunk(2, -1)[rank].contiguous()
                options = {"vocab_size": entries, "label_smoothing": smoothing, "tp_group": group}
                compare(ours(local, labels, grad, **options), (losses, gradient.chunk(2, -1)[rank]), CUT_OFF)
    dist.destroy_process_group()


@pytest.mark.parametrize("device, dtype", [("cpu", FP32), pytest.param("cuda", torch.float64, marks=pytest.mark.gpu)])
def test_a_cpu_and_float64_have_megatrons_loss(device: str, dtype: torch.dtype) -> None:
    logits, labels, _ = (x.to(device) for x in inputs("even", dtype))
    assert cross_entropy(logits, labels, vocab_size=64) is None


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("backend, arch, warp_size", [("cuda", 90, 32), ("hip", "gfx942", 64)])
def test_kernels_compile_without_gpu(
    backend: str, arch: Any, warp_size: int, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Down to the binaries of an H100, with loads of 16 bytes, and an MI300X."""
    import triton
    from triton.backends.compiler import GPUTarget

    from archscale_megatron.ops import cross_entropy_triton as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = {"logits": f"*{dtype}", "labels": "*i64", "label_weight": "fp32", "entry_weight": "fp32"}
    types |= dict.fromkeys(("vectors", "row_stride", "first", "local_vocab_size"), "i32")
    for kernel in (kernels._loss_forward_kernel, kernels._loss_backward_kernel):
        for smoothed in (False, True):
            constants = {"SMOOTHED": smoothed, "VECTOR": 8 if dtype == "bf16" else 4, "VECTORS": kernels.VECTORS}
            signature = {n: "constexpr" if n in constants else types.get(n, "*fp32") for n in kernel.arg_names}
            aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if n == "logits"}
            source = triton.compiler.ASTSource(kernel, signature, constants, aligned)
            binary = triton.compile(source, target=GPUTarget(backend, arch, warp_size), options={"num_warps": 8})
            assert binary.asm["cubin" if backend == "cuda" else "hsaco"]
            assert backend != "cuda" or "ld.global.v4.b32" in binary.asm["ptx"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", CASES)
def test_kernels_on_gpu(name: str, smoothing: float, dtype: torch.dtype) -> None:
    if name != "huge" or dtype != FP16:
        check_case(name, smoothing, dtype, "cuda", TOLERANCES)


@pytest.mark.gpu
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("rows, columns, vocab_size", [(4096, 32_000, 32_000), (700, 200_064, 200_019)])
def test_large_vocabularies_on_gpu(rows: int, columns: int, vocab_size: int, smoothing: float) -> None:
    """Against torch's own loss; results repeat exactly."""
    generator = torch.Generator("cuda").manual_seed(1)
    logits = torch.randn(rows, columns, generator=generator, device="cuda").mul_(4).bfloat16()
    labels = torch.randint(vocab_size, (rows,), generator=generator, device="cuda")
    grad = torch.rand(rows, generator=generator, device="cuda")
    found, again = (ours(logits, labels, grad, vocab_size=vocab_size, label_smoothing=smoothing) for _ in range(2))
    assert all(a.equal(b) for a, b in zip(found, again, strict=True))
    exact = logits.double().requires_grad_()
    if vocab_size == columns:
        losses = F.cross_entropy(exact, labels, label_smoothing=smoothing, reduction="none")
        expected = losses.detach(), torch.autograd.grad(losses, exact, grad.double())[0]
    else:
        expected = reference(logits, labels, grad, vocab_size, smoothing)
    compare(found, expected, TOLERANCES)


@pytest.mark.gpu
def test_more_than_2_to_31_logits_on_gpu() -> None:
    logits = torch.zeros(16_384, 140_000, dtype=BF16, device="cuda", requires_grad=True)
    labels = torch.arange(16_384, device="cuda")
    losses = cross_entropy(logits * 1, labels, vocab_size=140_000)
    assert losses is not None
    torch.testing.assert_close(losses, torch.full_like(losses, 140_000).log(), rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    last = gradient[-1].double()
    assert last[labels[-1]].item() == pytest.approx(-1, rel=2**-7)
    assert last.sum().item() == pytest.approx(0, abs=2**-7)


if __name__ == "__main__":
    {"alone": alone, "parallel": parallel}[sys.argv[1]]()
