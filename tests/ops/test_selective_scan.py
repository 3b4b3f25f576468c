"""selective_scan against a float64 loop over the steps: values and all gradients.

Run as a script, this file checks the Triton kernels in Triton's interpreter, which must be chosen before
Triton is imported.
"""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from archscale_megatron.ops import selective_scan as module
from archscale_megatron.ops.selective_scan import selective_scan

ROOT = Path(__file__).parents[2]
NAMES = ("x", "dt", "A", "B", "C", "D", "dt_bias")
FP32 = 1e-5
# An fp32 result rounded to bf16 is off by up to 2^-8 of itself; Triton's interpreter cuts it off: up to 2^-7.
BF16, BF16_CUT_OFF = 2**-8 + FP32, 2**-7 + FP32


def reference(x, dt, A, B, C, D, dt_bias=None, starts=None):
    """The definition, one step after the other, in float64."""
    x, dt, A, B, C, D = (v.double() for v in (x, dt, A, B, C, D))
    delta = torch.logaddexp(dt if dt_bias is None else dt + dt_bias.double(), torch.zeros((), dtype=dt.dtype))
    h = torch.zeros(x.shape[1], *A.shape, dtype=x.dtype)
    if starts is None:
        starts = torch.zeros(x.shape[:2], dtype=torch.bool)
    outputs = []
    # unbind, for the gradient of an index is as large as what it indexes
    for x_t, delta_t, B_t, C_t, start in zip(*(v.unbind() for v in (x, delta, B, C, starts)), strict=True):
        h = torch.where(start[:, None, None], 0.0, h)
        h = torch.exp(delta_t[:, :, None] * A) * h + (delta_t * x_t)[:, :, None] * B_t[:, None, :]
        outputs.append((h * C_t[:, None, :]).sum(-1) + D * x_t)
    return torch.stack(outputs)


def make_inputs(s, b, d, n, dtype=torch.float32, seed=0):
    """Inputs by name. Decays range from forgetting at once to remembering hundreds of steps."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    inputs = {
        "x": normal(s, b, 2 * d).to(dtype)[..., :d],  # as after a projection that is cut in two
        "dt": normal(s, b, d).to(dtype),
        "A": -torch.exp(2 * normal(d, n)),
        "B": normal(s, b, n).to(dtype),
        "C": normal(s, b, n).to(dtype),
        "D": normal(d),
        "dt_bias": normal(d) - 2,
    }
    starts = torch.rand(s, b, generator=generator) < 0.1
    weight = normal(s, b, d).to(dtype)  # the gradient of y
    return inputs, starts, weight


def value_and_gradients(function, inputs, weight, starts=None, **options):
    leaves = {name: v.detach().requires_grad_() for name, v in inputs.items()}
    y = function(*(leaves.get(name) for name in NAMES), starts, **options)
    y.backward(weight.to(y.device, y.dtype))
    return {"y": y.detach()} | {name: v.grad for name, v in leaves.items()}


def assert_close(actual, expected, tolerance):
    """Largest difference at most `tolerance` of the largest value, for each tensor."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        difference = (actual[name].cpu().double() - value.double()).abs().max()
        assert difference <= tolerance * value.abs().max(), (name, difference, value.abs().max())


def compare(shape, dtype, tolerance, with_starts, with_bias=True, device="cpu", **options):
    """Against the reference. A, D and dt_bias, being fp32, are held to fp32's tolerance always."""
    inputs, starts, weight = make_inputs(*shape, dtype=dtype)
    if not with_bias:
        del inputs["dt_bias"]
    starts = starts if with_starts else None
    expected = value_and_gradients(reference, {name: v.double() for name, v in inputs.items()}, weight.double(), starts)
    on_device = {name: v.to(device) for name, v in inputs.items()}
    device_starts = None if starts is None else starts.to(device)
    actual = value_and_gradients(selective_scan, on_device, weight, device_starts, **options)
    assert actual["y"].dtype == dtype
    parameters = {"A", "D", "dt_bias"} & expected.keys()
    for names, limit in ((parameters, FP32), (expected.keys() - parameters, tolerance)):
        assert_close({n: actual[n] for n in names}, {n: expected[n] for n in names}, limit)


SHAPES = [(1, 3, 4, 2), (31, 1, 5, 3), (32, 2, 8, 16), (33, 2, 3, 1), (70, 1, 6, 16), (700, 2, 24, 16)]


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("with_starts", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_torch_fp32(shape, with_starts, with_bias):
    compare(shape, torch.float32, FP32, with_starts, with_bias)


@pytest.mark.parametrize("with_starts", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_torch_bf16(shape, with_starts):
    compare(shape, torch.bfloat16, BF16, with_starts)


def test_gradcheck():
    inputs, starts, _ = make_inputs(35, 2, 2, 2)  # longer than a chunk
    leaves = [v.double().requires_grad_() for v in inputs.values()]
    assert torch.autograd.gradcheck(lambda *args: selective_scan(*args, starts), leaves)


def test_documents_are_independent():
    lengths = [1, 30, 1, 1, 32, 64, 11]  # starts inside, before and after the edges of chunks
    inputs, _, weight = make_inputs(sum(lengths), 1, 6, 4)
    starts = torch.zeros(sum(lengths), 1, dtype=torch.bool)
    starts[torch.tensor([0, *lengths[:-1]]).cumsum(0)] = True
    packed = value_and_gradients(selective_scan, inputs, weight, starts)

    alone = []
    cut = {name: v.split(lengths) if name in ("x", "dt", "B", "C") else None for name, v in inputs.items()}
    for k, part in enumerate(weight.split(lengths)):
        document = {name: inputs[name] if pieces is None else pieces[k] for name, pieces in cut.items()}
        alone.append(value_and_gradients(selective_scan, document, part))
    expected = {
        name: sum(r[name] for r in alone) if name in ("A", "D", "dt_bias") else torch.cat([r[name] for r in alone])
        for name in packed
    }
    assert_close(packed, expected, 1e-6)


def test_nothing_leaks_over_a_document_start():
    inputs, _, _ = make_inputs(40, 2, 4, 3)
    starts = torch.zeros(40, 2, dtype=torch.bool)
    starts[20, 0] = True
    before = selective_scan(*inputs.values(), starts)
    inputs["x"][:20] += 100
    after = selective_scan(*inputs.values(), starts)
    assert after[20:, 0].equal(before[20:, 0])
    assert not after[20:, 1].equal(before[20:, 1])  # the other row has no start there


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recompute_changes_nothing(use_reentrant):
    inputs, starts, weight = make_inputs(100, 2, 8, 4)

    def recomputed(*args):
        return checkpoint(selective_scan, *args, use_reentrant=use_reentrant)

    direct = value_and_gradients(selective_scan, inputs, weight, starts)
    for name, value in value_and_gradients(recomputed, inputs, weight, starts).items():
        assert value.equal(direct[name]), name


def test_extreme_steps():
    """Steps so large that all is forgotten, and so small that nothing changes: finite, and right."""
    inputs, starts, weight = make_inputs(70, 1, 6, 4)
    inputs["dt"][::3] = 1e4
    inputs["dt"][1::3] = -1e4
    expected = value_and_gradients(reference, {n: v.double() for n, v in inputs.items()}, weight.double(), starts)
    actual = value_and_gradients(selective_scan, inputs, weight, starts)
    assert all(v.isfinite().all() for v in actual.values())
    assert_close(actual, expected, FP32)


def test_autocast_leaves_it_alone():
    inputs, starts, weight = make_inputs(40, 1, 6, 4)
    plain = value_and_gradients(selective_scan, inputs, weight, starts)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = value_and_gradients(selective_scan, inputs, weight, starts)
    for name, value in autocast.items():
        assert value.equal(plain[name]), name


def test_gradients_only_of_what_needs_them():
    inputs, _, _ = make_inputs(40, 1, 6, 4)
    inputs["D"].requires_grad_()
    selective_scan(*inputs.values()).sum().backward()
    torch.testing.assert_close(inputs["D"].grad, inputs["x"].sum((0, 1)))


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("dt", torch.zeros(5, 2, 4), r"dt is \[5, 2, 4\]; it must be \[5, 2, 3\]"),
        ("B", torch.zeros(2, 5, 4), r"B is \[2, 5, 4\]; it must be \[5, 2, 4\]"),
        ("dt_bias", torch.zeros(1), r"dt_bias is \[1\]; it must be \[3\]"),
        ("x", torch.zeros(0, 2, 3), r"not empty"),
    ],
)
def test_wrong_shapes(name, value, message):
    inputs, _, _ = make_inputs(5, 2, 3, 4)
    with pytest.raises(ValueError, match=message):
        selective_scan(**(inputs | {name: value}))


@pytest.mark.parametrize("backend", ["mamba_ssm", "triton", "cuda"])
def test_unusable_backend(backend, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    inputs, _, _ = make_inputs(5, 2, 3, 4)
    with pytest.raises(ValueError, match=f"'{backend}' cannot serve torch.float32 cpu .* use one of: torch$"):
        selective_scan(**inputs, backend=backend)


def test_choice_of_backend(monkeypatch):
    def usable(dtype, device, with_starts, *installed):
        monkeypatch.setattr(module, "optional", lambda name: name if name in installed else None)
        x = types.SimpleNamespace(dtype=dtype, device=torch.device(device))
        return module._usable_backends(x, with_starts)

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    both = ("mamba_ssm", "triton")
    assert usable(torch.bfloat16, "cuda", False, *both) == ["triton", "mamba_ssm", "torch"]
    assert usable(torch.bfloat16, "cuda", True, *both) == ["triton", "torch"]
    assert usable(torch.bfloat16, "cuda", False, "mamba_ssm") == ["mamba_ssm", "torch"]
    assert usable(torch.bfloat16, "cuda", False) == ["torch"]
    assert usable(torch.float64, "cuda", False, *both) == ["torch"]
    assert usable(torch.float32, "cpu", False, *both) == ["torch"]


def test_cpu_needs_neither_triton_nor_mamba_ssm():
    code = (
        "import sys, torch; sys.modules.update(triton=None, mamba_ssm=None)\n"
        "from archscale_megatron.ops.selective_scan import selective_scan\n"
        "x, B, A, D = torch.ones(2, 1, 4), torch.ones(2, 1, 3), -torch.ones(4, 3), torch.ones(4)\n"
        "selective_scan(x, x, A, B, B, D)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_mamba_ssm_gets_its_layout(monkeypatch):
    """With a stand-in of mamba_ssm's signature and shapes: (b, d, l) and (b, n, l)."""

    def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
        assert z is None and delta_softplus and u.dtype == delta.dtype == B.dtype == C.dtype
        first = (v.permute(2, 0, 1) for v in (u, delta))
        y = reference(*first, A, *(v.permute(2, 0, 1) for v in (B, C)), D, delta_bias)
        return y.permute(1, 2, 0).to(u.dtype)

    interface = types.ModuleType("mamba_ssm.ops.selective_scan_interface")
    interface.selective_scan_fn = selective_scan_fn
    for name in ("mamba_ssm", "mamba_ssm.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, interface.__name__, interface)

    inputs, _, _ = make_inputs(9, 2, 4, 3)
    y = module._mamba_ssm_scan(*inputs.values())
    assert_close({"y": y}, {"y": reference(*inputs.values())}, FP32)


def test_triton_interpreted():
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, __file__], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("all right\n")


def check_triton_in_interpreter():
    for shape, dtype, tolerance, with_starts in [
        ((1, 2, 3, 2), torch.float32, FP32, True),
        ((33, 1, 9, 16), torch.float32, FP32, False),  # two time tiles, three channel blocks
        ((70, 2, 5, 3), torch.float32, FP32, True),  # states are padded to 4
        ((33, 1, 5, 16), torch.bfloat16, BF16_CUT_OFF, True),
    ]:
        compare(shape, dtype, tolerance, with_starts, backend="triton")
    # Chunks of time, the last one shorter, with a first pass; several programs that share a tile's channels, with a
    # part of the gradients of B and C each; a channel block that is not full.
    from archscale_megatron.ops import selective_scan_triton as kernels

    kernels.MANY_PROGRAMS, kernels.BLOCKS_PER_PROGRAM = 4, 1
    for with_starts in (False, True):
        compare((101, 1, 35, 16), torch.float32, FP32, with_starts, with_bias=False, backend="triton")
    print("all right")


@pytest.mark.parametrize("backend, arch, warp_size", [("cuda", 90, 32), ("hip", "gfx942", 64)])
def test_triton_compiles_without_gpu(backend, arch, warp_size, tmp_path, monkeypatch):
    """Down to the binaries of an H100 and an MI300X: what the interpreter accepts may not compile."""
    import triton
    from triton.backends.compiler import GPUTarget

    from archscale_megatron.ops import selective_scan_triton as scan

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    walk = {"UNROLL": scan.WALK_UNROLL, "BLOCK_D": scan.WALK_STATES // 16}
    walks = [walk | {"EVEN_D": even, "OUTPUT": not even} for even in (True, False)]
    tile = {"UNROLL": scan.TILE_UNROLL, "BLOCK_D": scan.TILE_STATES // 16, "EVEN_D": True}
    tiles = [tile | {"BLOCKS": scan.BLOCKS_PER_PROGRAM}]
    kernels = (
        (scan._scan_forward_kernel, walks),
        (scan._scan_carry_kernel, walks),
        (scan._scan_backward_kernel, tiles),
    )
    for kernel, blocks in ((kernel, one) for kernel, several in kernels for one in several):
        # Triton makes an argument that is 1 or None a constant, which compiles differently.
        for constants in ({"batch": 1, "starts": None}, {"length": 1, "batch": 1, "d": 1, "dt_bias": None}, {}):
            constants = {"TILE": scan.TILE, "BLOCK_N": 16} | blocks | constants
            constants = {n: v for n, v in constants.items() if n in kernel.arg_names}
            sizes = ("length", "batch", "d", "x_stride", "dt_stride", "dy_stride", "chunk_tiles", "steps")
            types_ = {"starts": "*i8"} | dict.fromkeys(sizes, "i32")
            types_ |= dict.fromkeys(("x", "dt", "y", "dy", "grad_x", "grad_dt"), "*bf16")
            types_ |= dict.fromkeys(constants, "constexpr")
            signature = {name: types_.get(name, "*fp32") for name in kernel.arg_names}
            source = triton.compiler.ASTSource(kernel, signature, constants)
            compiled = triton.compile(source, target=GPUTarget(backend, arch, warp_size), options={"num_warps": 1})
            assert compiled.asm["cubin" if backend == "cuda" else "hsaco"]


@pytest.mark.gpu
@pytest.mark.parametrize("with_starts", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, FP32), (torch.bfloat16, BF16)])
@pytest.mark.parametrize("shape", [*SHAPES, (1000, 2, 300, 16), (257, 3, 64, 128)])
def test_triton_on_gpu(shape, dtype, tolerance, with_starts):
    compare(shape, dtype, tolerance, with_starts, device="cuda", backend="triton")


@pytest.mark.gpu
def test_triton_on_gpu_repeats_exactly():
    inputs, starts, weight = make_inputs(1000, 2, 300, 16)
    inputs = {name: v.cuda() for name, v in inputs.items()}
    first, second = (
        value_and_gradients(selective_scan, inputs, weight, starts.cuda(), backend="triton") for _ in range(2)
    )
    for name, value in first.items():
        assert value.equal(second[name]), name


if __name__ == "__main__":
    check_triton_in_interpreter()
