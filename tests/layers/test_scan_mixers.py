"""Mamba-2, Gated DeltaNet and the GMU with a norm against their formulas in float64, with scans and convs in loops."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.models.backends import LocalSpecProvider
from torch.nn import functional as F

from archscale_megatron.layers import mamba1
from archscale_megatron.layers.mamba1 import mamba1_spec
from tests.layers.mixers import SPECS, build_mixer, inputs, run
from tests.ops.test_causal_conv import reference as conv
from tests.ops.test_gated_delta_rule import reference as delta_rule
from tests.ops.test_ssd import reference as scan

pytestmark = pytest.mark.usefixtures("one_process")


def gated_norm(x, gate, weight):
    x = x * gate * torch.sigmoid(gate)
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5) * weight


def mamba2(p, hidden, starts):
    z, x, B, C, dt = (hidden @ p["in_proj.weight"].T).split([24, 24, 10, 10, 4], -1)
    x_B_C = conv(torch.cat([x, B, C], -1), p["conv1d.weight"], p["conv1d.bias"], starts)
    x, B, C = x_B_C.split([24, 10, 10], -1)
    x = x.unflatten(-1, (4, 6))
    y = scan(x, dt, -torch.exp(p["A_log"]), B, C, p["D"], p["dt_bias"], starts).flatten(2)
    return gated_norm(y, z, p["norm.weight"]) @ p["out_proj.weight"].T, y


def gated_delta_net(p, hidden, starts):
    qkv, z, b, a = (hidden @ p["in_proj.weight"].T).split([48, 24, 2, 2], -1)
    q, k, v = conv(qkv, p["conv1d.weight"], None, starts).split([12, 12, 24], -1)
    q, k, v = q.unflatten(-1, (2, 6)), k.unflatten(-1, (2, 6)), v.unflatten(-1, (2, 12))
    g = -torch.exp(p["A_log"]) * F.softplus(a + p["dt_bias"])
    o = delta_rule(q, k, v, g, 2 / (1 + torch.exp(-b)), starts).flatten(2)
    return gated_norm(o, z, p["norm.weight"]) @ p["out_proj.weight"].T, o


REFERENCES = {"mamba2": mamba2, "gated_delta_net": gated_delta_net}


def reference(kind, p, hidden, memory, starts):
    if kind == "gmu":
        gate = hidden @ p["in_proj.weight"].T
        return gated_norm(memory, gate, p["norm.weight"]) @ p["out_proj.weight"].T, memory
    return REFERENCES[kind](p, hidden, starts)


def value_and_gradients(function, parameters, data):
    hidden, memory = (data[name].clone().requires_grad_() for name in ("hidden", "memory"))
    output, written = function(hidden, memory)
    leaves = {"hidden": hidden, "memory": memory} | parameters
    ((output * data["grad_output"]).sum() + (written * data["grad_memory"]).sum()).backward()
    gradients = {f"grad.{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {"output": output.detach(), "written": written.detach()} | gradients


def difference(actual, expected):
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("with_starts", [False, True])
def test_equals_its_formula(kind, with_starts):
    mixer, data = build_mixer(kind), inputs()
    starts = data.pop("starts") if with_starts else None
    actual = value_and_gradients(lambda *x: run(mixer, *x, starts), dict(mixer.named_parameters()), data)
    exact = {name: p.detach().double().requires_grad_() for name, p in mixer.named_parameters()}
    data = {name: x.double() for name, x in data.items() if name != "starts"}
    expected = value_and_gradients(lambda *x: reference(kind, exact, *x, starts), exact, data)
    assert actual.keys() == expected.keys() >= {f"grad.{name}" for name in exact}
    wrong = {name: d for name, e in expected.items() if not (d := difference(actual[name], e)) < 1e-5}
    assert not wrong


def test_padded_projections_change_nothing(monkeypatch):
    """Those of Mamba-1 around dt, whose 5 channels a GPU gets as 8."""
    spec = mamba1_spec(LocalSpecProvider(), d_inner=24, dt_rank=5, state_size=4, conv_kernel=4)
    results = []
    for padding in (0, 3):
        monkeypatch.setattr(mamba1, "_padding", lambda width, x, padding=padding: padding)
        mixer, data = build_mixer(spec), inputs()
        projected = mixer.x_proj(torch.randn(3, 2, 24))
        assert projected.shape == (3, 2, 13 + padding) and not projected[..., 5 : 5 + padding].any()
        starts = data.pop("starts")
        parameters = dict(mixer.named_parameters())
        results.append(value_and_gradients(lambda *x, m=mixer, s=starts: run(m, *x, s), parameters, data))
    plain, padded = results
    assert padded.keys() == plain.keys() >= {"grad.x_proj.weight", "grad.dt_proj.weight"}
    assert max(difference(padded[name], value.double()) for name, value in plain.items()) < 1e-6


def test_padded_is_what_half_precision_on_a_gpu_needs():
    gpu = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16)
    assert [mamba1._padding(width, gpu) for width in (5, 8, 124, 128)] == [3, 0, 4, 0]
    for is_cuda, dtype in [(True, torch.float32), (False, torch.bfloat16)]:
        assert mamba1._padding(5, SimpleNamespace(is_cuda=is_cuda, dtype=dtype)) == 0


@pytest.mark.parametrize("kind", ["mamba2", "gated_delta_net"])
def test_bf16_keeps_what_the_recurrence_is_sensitive_to(kind):
    mixer, data = build_mixer(kind), inputs()
    starts = data["starts"]
    expected = run(mixer, data["hidden"], data["memory"], starts)
    kept = {name: p.detach().clone() for name, p in mixer.named_parameters() if name in mixer.fp32_parameters}
    mixer.bfloat16()
    for name, p in mixer.named_parameters():
        assert p.equal(kept[name]) if name in kept else p.dtype == torch.bfloat16
    for actual, e in zip(run(mixer, data["hidden"].bfloat16(), data["memory"], starts), expected, strict=True):
        assert actual.dtype == torch.bfloat16
        assert difference(actual, e.double()) < 0.05
