"""ssd against a float64 loop over the steps: values and all gradients."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from archscale_megatron.ops import ssd as module
from archscale_megatron.ops.ssd import ssd
from tests.ops.recurrences import FP32, assert_close, compare, documents_alone, stand_in, value_and_gradients


def reference(x, dt, A, B, C, D, dt_bias, document_starts=None):
    """The definition, one step after the other."""
    delta = torch.logaddexp(dt + dt_bias, torch.zeros((), dtype=dt.dtype))
    h = x.new_zeros(*x.shape[1:], B.shape[-1])
    starts = torch.zeros(x.shape[:2], dtype=torch.bool) if document_starts is None else document_starts
    outputs = []
    for x_t, delta_t, B_t, C_t, start in zip(*(v.unbind() for v in (x, delta, B, C, starts)), strict=True):
        h = torch.where(start[:, None, None, None], 0.0, h)
        h = torch.exp(delta_t * A)[..., None, None] * h + (delta_t[..., None] * x_t)[..., None] * B_t[:, None, None]
        outputs.append((h * C_t[:, None, None]).sum(-1) + D[:, None] * x_t)
    return torch.stack(outputs)


def make_inputs(s, b, h, p, n, dtype=torch.float32):
    """Inputs by name. Decays range from forgetting at once to remembering hundreds of steps."""
    generator = torch.Generator().manual_seed(s + n)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    inputs = {
        "x": normal(s, b, 2 * h, p).to(dtype)[:, :, :h],  # as after a projection that is cut in two
        "dt": normal(s, b, h).to(dtype),
        "A": -torch.exp(2 * normal(h)),
        "B": normal(s, b, n).to(dtype),
        "C": normal(s, b, n).to(dtype),
        "D": normal(h),
        "dt_bias": normal(h) - 2,
    }
    return inputs, torch.rand(s, b, generator=generator) < 0.1, normal(s, b, h, p).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_starts", [False, True])
@pytest.mark.parametrize("shape, chunk_size", [
    ((1, 2, 3, 2, 4), 128), ((37, 2, 3, 4, 5), 8), ((32, 1, 2, 3, 1), 16), ((9, 2, 2, 4, 3), 1),
    ((300, 2, 4, 8, 16), 128),
])  # fmt: skip
def test_equals_a_loop(shape, chunk_size, with_starts, dtype):
    inputs, starts, weight = make_inputs(*shape, dtype)
    compare(partial(ssd, chunk_size=chunk_size), reference, inputs, weight, starts if with_starts else None)


def test_gradcheck():
    inputs, starts, _ = make_inputs(7, 2, 2, 2, 2)
    leaves = [v.double().requires_grad_() for v in inputs.values()]

    def function(*args):
        return ssd(**dict(zip(inputs, args, strict=True)), document_starts=starts, chunk_size=4)

    assert torch.autograd.gradcheck(function, leaves)


def test_documents_are_independent():
    lengths = [1, 14, 1, 1, 15, 32, 5]  # starts inside, before and after the edges of chunks of 16
    inputs, _, weight = make_inputs(sum(lengths), 1, 3, 4, 5)
    assert_close(*documents_alone(partial(ssd, chunk_size=16), inputs, weight, lengths), FP32)


def test_nothing_leaks_over_a_document_start():
    inputs, _, _ = make_inputs(40, 2, 2, 4, 3)
    starts = torch.zeros(40, 2, dtype=torch.bool)
    starts[20, 0] = True
    before = ssd(**inputs, document_starts=starts, chunk_size=16)
    inputs["x"][:20] += 100
    after = ssd(**inputs, document_starts=starts, chunk_size=16)
    assert after[20:, 0].equal(before[20:, 0])
    assert not after[20:, 1].equal(before[20:, 1])  # the other row has no start there


def test_extreme_steps():
    """Steps so large that all is forgotten, and so small that nothing changes: finite, and right."""
    inputs, starts, weight = make_inputs(70, 1, 3, 4, 4)
    inputs["dt"][::7] = 1e4
    inputs["dt"][1::7] = -1e4
    compare(partial(ssd, chunk_size=32), reference, inputs, weight, starts)


def test_recompute_and_autocast_change_nothing():
    inputs, starts, weight = make_inputs(40, 1, 2, 4, 3)
    direct = value_and_gradients(ssd, inputs, weight, starts)

    def recomputed(document_starts, **leaves):
        def function(*args):
            return ssd(**dict(zip(leaves, args, strict=True)), document_starts=document_starts)

        return checkpoint(function, *leaves.values(), use_reentrant=True)  # as Megatron's

    for function in (recomputed, torch.autocast("cpu", torch.bfloat16)(ssd)):
        other = value_and_gradients(function, inputs, weight, starts)
        assert all(value.equal(direct[name]) for name, value in other.items())


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("dt", torch.zeros(5, 2, 4), r"dt is \[5, 2, 4\]; it must be \[5, 2, 3\]"),
        ("C", torch.zeros(5, 2, 1), r"C is \[5, 2, 1\]; it must be \[5, 2, 4\]"),
        ("D", torch.zeros(1), r"D is \[1\]; it must be \[3\]"),
        ("x", torch.zeros(0, 2, 3, 2), "not empty"),
        ("document_starts", torch.zeros(2, 5, dtype=torch.bool), "document_starts is"),
    ],
)
def test_wrong_arguments_are_refused(name, value, message):
    inputs, _, _ = make_inputs(5, 2, 3, 2, 4)
    with pytest.raises(ValueError, match=message):
        ssd(**(inputs | {name: value}))


@pytest.mark.parametrize("with_starts", [False, True])
def test_mamba_ssm_gets_its_layout(monkeypatch, with_starts):
    """With a stand-in of mamba_ssm's signature and shapes: [b, s, ...], and numbers of documents."""

    def mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None,
                                  seq_idx=None, cu_seqlens=None, dt_softplus=False):  # fmt: skip
        assert dt_softplus and x.dtype == dt.dtype == B.dtype == C.dtype and B.shape[2] == C.shape[2] == 1
        starts = None
        if seq_idx is not None:
            assert seq_idx.dtype == torch.int32
            starts = torch.cat([seq_idx[:, :1] == 0, seq_idx.diff(dim=1) != 0], 1).t()
        B, C = (v.squeeze(2).transpose(0, 1) for v in (B, C))
        y = reference(x.transpose(0, 1), dt.transpose(0, 1), A, B, C, D, dt_bias, starts)
        return y.transpose(0, 1)

    stand_in(monkeypatch, "mamba_ssm.ops.triton.ssd_combined", mamba_chunk_scan_combined=mamba_chunk_scan_combined)
    inputs, starts, _ = make_inputs(9, 2, 2, 4, 3)
    starts = starts if with_starts else None
    y = module._mamba_ssm(*inputs.values(), starts, 128)
    assert_close({"y": y}, {"y": reference(**inputs, document_starts=starts)}, FP32)


@pytest.mark.gpu
@pytest.mark.parametrize("with_starts", [False, True])
def test_mamba_ssm_on_gpu(with_starts):
    pytest.importorskip("mamba_ssm.ops.triton.ssd_combined")
    inputs, starts, weight = make_inputs(700, 2, 4, 64, 128, torch.bfloat16)
    inputs |= {name: inputs[name] / 8 for name in ("B", "C")}
    compare(ssd, reference, inputs, weight, starts if with_starts else None, "cuda", tolerance=2e-2)
