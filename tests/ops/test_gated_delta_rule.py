"""gated_delta_rule against a float64 loop over the steps: values and all gradients."""

import warnings

import pytest
import torch

from archscale_megatron.ops import gated_delta_rule as module
from archscale_megatron.ops.gated_delta_rule import gated_delta_rule
from tests.ops.recurrences import (
    FP32,
    assert_close,
    compare,
    documents_alone,
    kept_for_backward,
    stand_in,
    value_and_gradients,
)


def reference(q, k, v, g, beta, document_starts=None):
    """The definition, one step after the other, with the matrix I - beta k k^T in full."""
    q, k = (x / torch.sqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    q = q / q.shape[-1] ** 0.5
    state = v.new_zeros(*v.shape[1:], k.shape[-1])
    eye = torch.eye(k.shape[-1], dtype=k.dtype)
    starts = torch.zeros(q.shape[:2], dtype=torch.bool) if document_starts is None else document_starts
    outputs = []
    for q_t, k_t, v_t, g_t, beta_t, start in zip(*(x.unbind() for x in (q, k, v, g, beta, starts)), strict=True):
        state = torch.where(start[:, None, None, None], 0.0, state)
        beta_t = beta_t[..., None, None]
        state = torch.exp(g_t)[..., None, None] * state @ (eye - beta_t * k_t[..., None] * k_t[..., None, :])
        state = state + beta_t * v_t[..., None] * k_t[..., None, :]
        outputs.append((state @ q_t[..., None]).squeeze(-1))
    return torch.stack(outputs)


def make_inputs(s, b, h, dk, dv, dtype=torch.float32):
    """Inputs by name. Decays range from forgetting at once to remembering hundreds of steps, beta from 0 to 2."""
    generator = torch.Generator().manual_seed(s + dk)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    inputs = {
        "q": normal(s, b, h, dk).to(dtype),
        "k": normal(s, b, 2 * h, dk).to(dtype)[:, :, :h],  # as after a projection that is cut in two
        "v": normal(s, b, h, dv).to(dtype),
        "g": -torch.exp(2 * normal(s, b, h) - 3),
        "beta": 2 * torch.sigmoid(normal(s, b, h)),
    }
    return inputs, torch.rand(s, b, generator=generator) < 0.1, normal(s, b, h, dv).to(dtype)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_SIZE", 16)


SHAPES = [(1, 2, 3, 4, 2), (37, 2, 3, 4, 5), (64, 1, 2, 2, 8), (150, 2, 2, 8, 16)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_starts", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_a_loop(shape, with_starts, dtype):
    inputs, starts, weight = make_inputs(*shape, dtype)
    compare(gated_delta_rule, reference, inputs, weight, starts if with_starts else None)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("with_starts", [False, True])
def test_more_chunks(with_starts):
    inputs, starts, weight = make_inputs(101, 2, 2, 4, 6)
    compare(gated_delta_rule, reference, inputs, weight, starts if with_starts else None)


@pytest.mark.usefixtures("small_chunks")
def test_gradcheck():
    inputs, starts, _ = make_inputs(19, 2, 1, 2, 2)
    leaves = [v.double().requires_grad_() for v in inputs.values()]
    assert torch.autograd.gradcheck(lambda *args: gated_delta_rule(*args, document_starts=starts), leaves)


@pytest.mark.usefixtures("small_chunks")
def test_documents_are_independent():
    lengths = [1, 14, 1, 1, 15, 32, 5]  # starts inside, before and after the edges of chunks of 16
    inputs, _, weight = make_inputs(sum(lengths), 1, 3, 4, 5)
    assert_close(*documents_alone(gated_delta_rule, inputs, weight, lengths), FP32)


@pytest.mark.usefixtures("small_chunks")
def test_nothing_leaks_over_a_document_start():
    inputs, _, _ = make_inputs(40, 2, 2, 4, 3)
    starts = torch.zeros(40, 2, dtype=torch.bool)
    starts[20, 0] = True
    before = gated_delta_rule(**inputs, document_starts=starts)
    inputs["v"][:20] += 100
    after = gated_delta_rule(**inputs, document_starts=starts)
    assert after[20:, 0].equal(before[20:, 0])
    assert not after[20:, 1].equal(before[20:, 1])  # the other row has no start there


def test_hard_inputs():
    """One key over and over, reflected (beta = 2), no decay, decays that leave nothing, and a key of zeros."""
    inputs, starts, weight = make_inputs(150, 1, 2, 4, 4)
    inputs["k"][:] = inputs["k"][:1]
    inputs["k"][5] = 0
    inputs["beta"][::2] = 2
    inputs["g"][::3] = 0
    inputs["g"][1::11] = -1e4
    compare(gated_delta_rule, reference, inputs, weight, starts, tolerance=5e-5)


def test_memory_is_linear_in_the_length():
    """About what the inputs and a state a chunk take; a few numbers a pair of steps would be far more."""
    inputs, _, _ = make_inputs(1024, 1, 2, 4, 4)
    long, short = ({name: v[:size].clone() for name, v in inputs.items()} for size in (1024, 512))
    kept = kept_for_backward(gated_delta_rule, long)
    assert kept <= 2.1 * kept_for_backward(gated_delta_rule, short)
    assert kept <= 2 * sum(v.untyped_storage().nbytes() for v in long.values())


def test_autocast_changes_nothing():
    inputs, starts, weight = make_inputs(40, 1, 2, 4, 3)
    direct = value_and_gradients(gated_delta_rule, inputs, weight, starts)
    other = value_and_gradients(torch.autocast("cpu", torch.bfloat16)(gated_delta_rule), inputs, weight, starts)
    assert all(value.equal(direct[name]) for name, value in other.items())


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("k", torch.zeros(5, 2, 3, 2), r"k is \[5, 2, 3, 2\]; it must be \[5, 2, 3, 4\]"),
        ("v", torch.zeros(5, 2, 1, 2), r"v is \[5, 2, 1, 2\]; it must be \[5, 2, 3, 2\]"),
        ("g", torch.zeros(5, 2), r"g is \[5, 2\]; it must be \[5, 2, 3\]"),
        ("q", torch.zeros(0, 2, 3, 2), "not empty"),
        ("document_starts", torch.zeros(2, 5, dtype=torch.bool), "document_starts is"),
    ],
)
def test_wrong_arguments_are_refused(name, value, message):
    inputs, _, _ = make_inputs(5, 2, 3, 4, 2)
    with pytest.raises(ValueError, match=message):
        gated_delta_rule(**(inputs | {name: value}))


@pytest.mark.parametrize("with_starts", [False, True])
def test_fla_gets_its_layout(monkeypatch, with_starts):
    """With a stand-in of FLA's signature and shapes: [b, s, ...], and one row for all documents."""

    def chunk_gated_delta_rule(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False,
                               use_qk_l2norm_in_kernel=False, cu_seqlens=None):  # fmt: skip
        assert use_qk_l2norm_in_kernel and g.dtype == torch.float32
        starts = None
        if cu_seqlens is not None:
            assert q.shape[0] == 1 and cu_seqlens.dtype == torch.int64 and cu_seqlens[-1] == q.shape[1]
            starts = torch.zeros(q.shape[1], 1, dtype=torch.bool)
            starts[cu_seqlens[:-1]] = True
        o = reference(*(x.transpose(0, 1) for x in (q, k, v, g, beta)), starts)
        return o.transpose(0, 1), None

    stand_in(monkeypatch, "fla.ops.gated_delta_rule", chunk_gated_delta_rule=chunk_gated_delta_rule)
    inputs, starts, _ = make_inputs(9, 2, 2, 4, 3)
    starts = starts if with_starts else None
    o = module._fla(*inputs.values(), starts)
    assert_close({"o": o}, {"o": reference(**inputs, document_starts=starts)}, FP32)


@pytest.mark.parametrize(
    ("capability", "triton", "serves"),
    [(9, "3.3.1", True), (9, "3.4.0", False), (9, "3.7.0", False), (9, "3.7.1", True), (10, "3.6.0", True)],
)
def test_fla_is_left_out_where_its_gradients_are_wrong(monkeypatch, capability, triton, serves):
    monkeypatch.setattr(module, "optional", lambda name: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
    monkeypatch.setattr(module.importlib.metadata, "version", lambda name: triton)
    module._fla_serves.cache_clear()
    with warnings.catch_warnings(record=True) as heard:
        assert module._fla_serves(torch.device("cuda")) == serves
    assert [triton in str(warning.message) for warning in heard] == [True] * (not serves)
    module._fla_serves.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("with_starts", [False, True])
def test_fla_on_gpu(with_starts):
    if not module._fla_serves(torch.device("cuda")):
        pytest.skip("flash-linear-attention is not there, or has wrong gradients here")
    inputs, starts, weight = make_inputs(700, 2, 2, 256, 512, torch.bfloat16)
    compare(gated_delta_rule, reference, inputs, weight, starts if with_starts else None, "cuda", tolerance=2e-2)
