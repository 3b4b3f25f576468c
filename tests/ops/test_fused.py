"""Our Triton kernels between matrix products against formulas in float64: values and all gradients.

Run as a script, this file checks them in Triton's interpreter, which must be chosen before Triton is imported.
"""

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from archscale_megatron.ops import fused
from archscale_megatron.ops import norm as norm_module
from archscale_megatron.ops.gate import head_gate, silu_gate
from archscale_megatron.ops.norm import gated_rms_norm, norm
from archscale_megatron.ops.residual import residual_add
from archscale_megatron.ops.rotary import rotate
from archscale_megatron.ops.swiglu import swiglu

ROOT = Path(__file__).parents[2]
EPS = 1e-5
# Of a tensor's largest value. A fp32 result rounded to bf16 is off by up to 2^-8 of itself; Triton's interpreter cuts
# it off: up to 2^-7.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-8 + 1e-5}
CUT_OFF = TOLERANCES | {torch.bfloat16: 2**-7 + 1e-5}
BF16, FP32 = torch.bfloat16, torch.float32


def drawn(*shape: int, dtype: torch.dtype = FP32, strided: bool = False) -> Tensor:
    """Normal numbers; if `strided`, the second half of rows twice as wide, as a projection in two parts leaves them."""
    generator = torch.Generator().manual_seed(sum(shape))
    *rows, width = shape
    x = torch.randn(*rows, width * (2 if strided else 1), generator=generator).to(dtype)
    return x[..., width:] if strided else x


def rms_norm_reference(x: Tensor, weight: Tensor) -> Tensor:
    return x / ((x * x).mean(-1, keepdim=True) + EPS).sqrt() * weight


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return rms_norm_reference(x - x.mean(-1, keepdim=True), weight) + bias


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def swiglu_reference(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up


def fused_rms_norm(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return norm(x, weight, None, EPS)


def fused_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    return norm(x, weight, bias, EPS)


def fused_gated_norm(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    return gated_rms_norm(x, gate, weight, EPS)


def rotate_reference(x: Tensor, angles: Tensor) -> Tensor:
    """Multiplication of complex numbers."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], dim=-1)


def rotate_case(x: Tensor) -> "Case":
    """With angles as large as those of long sequences."""
    angles = (drawn(len(x), 1, 1, x.shape[-1] // 2).double() * 1e4).float()

    def turn(x: Tensor) -> Tensor:
        both = torch.cat([angles, angles], dim=-1).to(x.device)
        return rotate(x, both.cos(), both.sin())

    return turn, lambda x: rotate_reference(x, angles.double().to(x.device)), [x]


Case = tuple[Callable, Callable, list[Tensor]]


def cases(widths: tuple[int, ...], batch: int) -> dict[str, Case]:
    """Name -> what is tested, its reference in float64, and the inputs."""
    found: dict[str, Case] = {}
    for n in widths:
        shape = (5, batch, n)
        stream, weight, bias = drawn(*shape) + 0.5, drawn(n) + 1, drawn(n)
        for dtype in (FP32, BF16):
            w, b, of = weight.to(dtype), bias.to(dtype), f"of {n} in {dtype}"
            y, z = drawn(*shape, dtype=dtype), drawn(*shape, dtype=dtype, strided=True)
            found |= {
                f"rms_norm {of}": (fused_rms_norm, lambda x, w: (rms_norm_reference(x, w), x), [stream, w]),
                f"rms_norm alone {of}": (lambda x, w: norm(x, w, None, EPS)[0], rms_norm_reference, [z, w]),
                f"layer_norm {of}": (
                    fused_layer_norm,
                    lambda x, w, b: (layer_norm_reference(x, w, b), x),
                    [stream, w, b],
                ),
                f"gated rms_norm {of}": (
                    fused_gated_norm,
                    lambda x, gate, w: rms_norm_reference(x * silu(gate), w),
                    [y, z, w],
                ),
                f"silu_gate {of}": (silu_gate, lambda gate, x: silu(gate) * x, [z, y]),
                f"swiglu {of}": (swiglu, swiglu_reference, [drawn(*shape[:-1], 2 * n, dtype=dtype)]),
                f"residual_add {of}": (
                    lambda x, y: residual_add(x, y, None, 0.3),
                    lambda x, y: x + 0.3 * y,
                    [stream, z],
                ),
                f"residual_add with bias {of}": (
                    lambda x, y, b: residual_add(x, y, b, 0.3),
                    lambda x, y, b: x + 0.3 * (y + b),
                    [stream, y, b],
                ),
            }
    for heads, d in ((3, 8), (20, 128), (1, 64)):
        for dtype in (FP32, BF16):
            x, of = drawn(7, 3, heads, d, dtype=dtype, strided=True), f"of {heads} heads of {d} in {dtype}"
            gate = drawn(7, 3, heads, dtype=dtype)
            found |= {
                f"rotate {of}": rotate_case(x),
                f"head_gate {of}": (head_gate, lambda gate, x: x / (1 + torch.exp(-gate))[..., None], [gate, x]),
            }
    return found


def value_and_gradients(function: Callable, inputs: list[Tensor]) -> dict[str, Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    # Gradients that are strided, as those of a tensor that is cut.
    weights = [drawn(*y.shape, dtype=BF16, strided=True).to(y) for y in outputs]
    gradients = torch.autograd.grad(outputs, leaves, weights)
    named = {f"output {i}": y for i, y in enumerate(outputs)} | {f"gradient {i}": g for i, g in enumerate(gradients)}
    return {name: value.detach() for name, value in named.items()}


def compare(name: str, case: Case, device: str, tolerances: dict[torch.dtype, float]) -> None:
    function, reference, inputs = case
    expected = value_and_gradients(reference, [x.double().to(device) for x in inputs])
    assert fused.kernels("norm", inputs[0].to(device)) is not None, "torch code is compared"
    actual = value_and_gradients(function, [x.to(device) for x in inputs])
    for what, value in expected.items():
        got = actual[what]
        difference = (got.double() - value).abs().max()
        assert difference <= tolerances[got.dtype] * value.abs().max(), (name, what, difference, value.abs().max())


def test_kernels_interpreted() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, __file__], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("all right\n")


def check_in_interpreter() -> None:
    norm_module.PROGRAMS = 2  # each sums over several tiles of rows
    # Several narrow rows in a tile, the last one not full; a row wider than a block of elements.
    for name, case in (cases((24,), 205) | cases((2056,), 1)).items():
        compare(name, case, "cpu", CUT_OFF)
    print("all right")


OPTIONAL = ("gate", "bias", "grad_gate", "grad_bias", "grad_residual")  # of norms, as `bias` is of the residual sum


@pytest.mark.parametrize("backend, arch, warp_size", [("cuda", 90, 32), ("hip", "gfx942", 64)])
def test_kernels_compile_without_gpu(
    backend: str, arch: Any, warp_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Down to the binaries of an H100 and an MI300X: what the interpreter accepts may not compile."""
    import triton
    from triton.backends.compiler import GPUTarget

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    sizes = dict.fromkeys(("ROWS", "HEADS"), 2) | dict.fromkeys(("WIDTH", "HALF", "BLOCK"), 1024) | {"BACKWARD": True}
    compiled = 0
    for name in ("gate", "norm", "residual", "rotary"):
        module = importlib.import_module(f"archscale_megatron.ops.{name}_triton")
        for kernel in (value for key, value in vars(module).items() if key.endswith("_kernel")):
            absent = dict.fromkeys(OPTIONAL if name in ("norm", "residual") else ())
            for constants in (sizes, sizes | absent):
                constants = {n: v for n, v in constants.items() if n in kernel.arg_names}
                signature = {n: "constexpr" if n in constants else type_of(n) for n in kernel.arg_names}
                source = triton.compiler.ASTSource(kernel, signature, constants)
                binary = triton.compile(source, target=GPUTarget(backend, arch, warp_size))
                assert binary.asm["cubin" if backend == "cuda" else "hsaco"]
                compiled += 1
    assert compiled == 2 * 9


def type_of(argument: str) -> str:
    if argument in ("rows", "width", "batch", "count", "half") or argument.endswith("_stride"):
        return "i32"
    return "fp32" if argument in ("eps", "multiplier") else "*bf16"


@pytest.mark.gpu
@pytest.mark.parametrize("width, batch", [(24, 2001), (128, 1000), (1984, 301), (4096, 120), (8192, 120), (16384, 3)])
def test_kernels_on_gpu(width: int, batch: int) -> None:
    for name, case in cases((width,), batch).items():
        compare(name, case, "cuda", TOLERANCES)


@pytest.mark.gpu
def test_gradients_of_weights_repeat_exactly() -> None:
    for function, _, inputs in cases((1984,), 300).values():
        first, second = (value_and_gradients(function, [x.cuda() for x in inputs]) for _ in range(2))
        assert all(value.equal(second[name]) for name, value in first.items())


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_rotate_on_a_cpu_is_megatron_s_bit_for_bit(dtype: torch.dtype) -> None:
    from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb

    angles = drawn(6, 1, 1, 4).repeat(1, 1, 1, 2)
    config: Any = SimpleNamespace(apply_rope_fusion=False, rotary_interleaved=False)

    def ours(x: Tensor) -> Tensor:
        return rotate(x, angles.cos(), angles.sin())

    def theirs(x: Tensor) -> Tensor:
        return apply_rotary_pos_emb(x, angles, config=config, cp_group=config)

    actual, expected = (value_and_gradients(turn, [drawn(6, 2, 3, 8, dtype=dtype)]) for turn in (ours, theirs))
    assert all(value.equal(expected[name]) for name, value in actual.items())


def test_a_cpu_has_torch_code() -> None:
    assert fused.kernels("norm", torch.ones(2)) is None


if __name__ == "__main__":
    check_in_interpreter()
