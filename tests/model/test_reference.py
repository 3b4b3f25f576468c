"""Whole models against `tests/reference.py` in float64: losses, logits, and the gradient of every parameter."""

import dataclasses
import functools
from dataclasses import dataclass

import pytest
import torch
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch import Tensor

from archscale_megatron.archs.architecture import Architecture
from archscale_megatron.archs.build import build_architecture
from archscale_megatron.archs.families import FAMILIES
from tests.lively import lively_values
from tests.model.building import build
from tests.reference import MISTAKES, Reference, token_losses

pytestmark = pytest.mark.usefixtures("one_process")

# Options that no family has: in every linear and attention layer, alone and with each other.
WITH_OPTIONS = {
    "transformer with options": {
        "attention_sink": True, "attention_gate": True, "qk_norm": True, "qkv_bias": True,
        "attention_output_bias": True, "linear_bias": True,
    },
    "sambayattn with options": {
        "differential_attention": True, "attention_gate": True, "qk_norm": True, "linear_bias": True,
    },
}  # fmt: skip
EXPERTS = {
    "transformer_gqa4_h2_moe": {"sparsity": 3, "top_k": 4},
    "sambay_gqa4_moe": {"sparsity": 2, "top_k": 4, "shared_expert": True, "sqrt_gate": True},
}
# What a parametrisation sets; no two alike.
MULTIPLIERS = {"logit_multiplier": 0.7, "residual_multiplier": 0.4, "router_multiplier": 0.5, "softmax_scale": 0.6}
WITH_MULTIPLIERS = tuple(
    f"{family} with multipliers" for family in ("sambay", "sambayda", "transformersa", "sambay_gqa4_moe")
)
MODELS = (*FAMILIES, *WITH_OPTIONS, *WITH_MULTIPLIERS)
Outputs = tuple[Tensor, Tensor, dict[str, Tensor]]  # logits, losses, gradients
BATCH, SEQUENCE = 2, 37  # several windows, and a multiple of nothing

# Errors in the largest value of a tensor. Where many scans follow each other, roundings of 6e-8 grow to more than this;
# then a model may be off by no more than three times what the reference itself is, run in fp32.
FP32 = 1e-5
ROUNDINGS = 3
# Root mean square errors: bf16 rounds each activation by up to 2^-9 of it. To round the parameters alone so, in
# float64, makes about two thirds of the difference that bf16 does.
BF16 = 2
# Of all logits: some tokens choose other experts when rounded (tests/layers/test_moe.py has the same choices).
BF16_EXPERTS = 0.3
NOTICED = 5e-3  # what a mistake changes at least, in the largest value; the least of them changes 7e-2


def architecture(model: str, tied: bool = True) -> Architecture:
    """Depth 8, width 40: 8 heads of 8 channels, 4 key-value heads, 80 Mamba channels, 3 ranks of dt."""
    family = model.split()[0]
    own = family.startswith("transformer_")  # which are about their numbers of heads
    heads = {} if own else {"num_heads": 8, "num_kv_heads": 4}
    arch = build_architecture(
        family, 8, aspect_ratio=5, head_dim=8, local_window=5, context_length=18, vocab_size=96,
        tied_embeddings=tied, **heads, **WITH_OPTIONS.get(model, EXPERTS.get(family, {})),
    )  # fmt: skip
    # 8 heads of 10 channels, 2 heads with keys of 15
    multipliers = MULTIPLIERS if model in WITH_MULTIPLIERS else {}
    return dataclasses.replace(arch, mamba2_head_dim=10, mamba2_state_size=6, gdn_head_dim=15, **multipliers)


def reference_for(arch: Architecture, mistake: str | None = None) -> Reference:
    return Reference(
        arch.family, arch.depth, arch.num_attention_heads, arch.num_query_groups, arch.window, arch.full_window,
        arch.rotary_base, mistake, arch.experts_per_token, arch.sqrt_gate, arch.logit_multiplier,
        arch.residual_multiplier, arch.router_multiplier, arch.softmax_scale,
    )  # fmt: skip


@torch.no_grad()
def randomise(model: HybridModel) -> None:
    generator = torch.Generator().manual_seed(7)
    for name, parameter in sorted(model.named_parameters()):
        parameter.copy_(lively_values(name, tuple(parameter.shape), generator))


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """tokens and labels [b, s], and a weight for each token's loss, so that no two count alike."""
    generator = torch.Generator().manual_seed(11)
    tokens = torch.randint(96, (BATCH, SEQUENCE + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:], torch.rand(BATCH, SEQUENCE, generator=generator)


def run(model: HybridModel) -> Outputs:
    """logits [b, s, vocabulary], losses [b, s] and the gradients of the weighted loss."""
    tokens, labels, weights = (x.cuda() for x in batch())
    positions = torch.arange(SEQUENCE, device=tokens.device).expand_as(tokens)
    with torch.no_grad():
        logits = model(tokens, positions, None)
    model.zero_grad()
    losses = model(tokens, positions, None, labels=labels)
    (losses * weights).sum().backward()
    return logits, losses.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@dataclass(frozen=True)
class Comparison:
    """What a model computes, and what the reference does with the same parameters."""

    model: HybridModel
    got: Outputs
    parameters: dict[str, Tensor]
    expected: Outputs


@functools.cache
def comparison(family: str, tied: bool = True, dtype: torch.dtype = torch.float32) -> Comparison:
    arch = architecture(family, tied)
    model = build(arch, dtype)
    randomise(model)
    got = run(model)
    parameters = {name: p.detach().double().cpu().requires_grad_() for name, p in model.named_parameters()}
    return Comparison(model, got, parameters, reference_run(arch, parameters))


def reference_run(arch: Architecture, parameters: dict[str, Tensor]) -> Outputs:
    """As `run`, in the parameters' own precision."""
    tokens, labels, weights = batch()
    logits = reference_for(arch).logits(parameters, tokens)
    losses = token_losses(logits, labels)
    (losses * weights).sum().backward()
    # An expert that no token chose has none.
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in parameters.items()}
    return logits.detach(), losses.detach(), gradients


def error(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return ((got.double().cpu() - expected).abs().max() / (expected.abs().max() or 1.0)).item()


def errors(got: Outputs, expected: Outputs) -> tuple[float, float, float]:
    """Of the logits, of the losses, and of the worst gradient."""
    gradients = max(error(got[2][name], gradient) for name, gradient in expected[2].items())
    return error(got[0], expected[0]), error(got[1], expected[1]), gradients


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", MODELS)
def test_model_is_the_reference(family: str, tied: bool) -> None:
    c = comparison(family, tied)
    assert ("output_layer.weight" in c.parameters) is not tied
    found = errors(c.got, c.expected)
    if max(found) >= FP32:
        fp32 = {name: p.detach().float().requires_grad_() for name, p in c.parameters.items()}
        rounded = errors(reference_run(architecture(family, tied), fp32), c.expected)
        assert all(ours < max(FP32, ROUNDINGS * theirs) for ours, theirs in zip(found, rounded, strict=True))


@pytest.mark.parametrize(("family", "mistake"), [(f, m) for f in MODELS for m in MISTAKES[f]])
def test_the_comparison_notices(family: str, mistake: str) -> None:
    c = comparison(family)
    with torch.no_grad():
        logits = reference_for(architecture(family), mistake).logits(c.parameters, batch()[0])
    assert error(c.got[0], logits) > NOTICED


@pytest.mark.parametrize("family", MODELS)
def test_causal(family: str) -> None:
    """A token changes its own logits and later ones, no earlier one, not even by a rounding: unless there are experts,
    whose matrix products have as many rows as tokens have chosen them."""
    c = comparison(family)
    tokens = batch()[0].cuda()
    positions = torch.arange(SEQUENCE, device=tokens.device).expand_as(tokens)
    at = 20
    changed = tokens.clone()
    changed[:, at] = (changed[:, at] + 1) % 96
    with torch.no_grad():
        logits = c.model(changed, positions, None)
    rounding = FP32 * logits.abs().max() if family in EXPERTS else 0.0
    same = ((logits - c.got[0]).abs() <= rounding).all(-1)
    assert same[:, :at].all() and not same[:, at:].any()


RECOMPUTE = {
    "uniform 1": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "uniform 3": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 3},
    "block 11": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 11},
    "core_attn": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
}


def gradients_and_calls(dropout: float, **options: object) -> tuple[dict[str, Tensor], list[int], int]:
    """Gradients; how often each layer ran, and all core attentions together, forward and backward."""
    model = build(architecture("sambay"), hidden_dropout=dropout, attention_dropout=dropout, **options)
    randomise(model)
    layers, attentions = [0] * len(model.decoder.layers), [0]

    def count(counts: list[int], index: int, *_: object) -> None:
        counts[index] += 1

    for i, layer in enumerate(model.decoder.layers):
        layer.register_forward_pre_hook(functools.partial(count, layers, i))
        if hasattr(layer.mixer, "core_attention"):
            layer.mixer.core_attention.register_forward_pre_hook(functools.partial(count, attentions, 0))
    model_parallel_cuda_manual_seed(5, force_reset_rng=True)
    tokens, labels, weights = (x.cuda() for x in batch())
    (model(tokens, torch.zeros_like(tokens), None, labels=labels) * weights).sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}, layers, attentions[0]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("method", RECOMPUTE)
def test_recompute_changes_no_gradient(method: str, dropout: float) -> None:
    """Bit for bit, with the same dropout; and what should be recomputed is."""
    plain, layers, attentions = gradients_and_calls(dropout)
    assert (layers, attentions) == ([1] * 16, 4)
    recomputed, layers, attentions = gradients_and_calls(dropout, **RECOMPUTE[method])
    expected = {"block 11": [2] * 11 + [1] * 5, "core_attn": [1] * 16}.get(method, [2] * 16)
    assert layers == expected
    assert attentions == (7 if method == "block 11" else 8)
    for name, gradient in plain.items():
        assert torch.equal(gradient, recomputed[name]), name


@pytest.mark.parametrize("family", MODELS)
def test_bf16(family: str) -> None:
    """Parameters and matrix products in bf16; the residual stream and the scan's parameters in fp32."""
    c = comparison(family, dtype=torch.bfloat16)
    model = c.model.bfloat16()  # what Float16Module does
    streams: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda *a: streams.append(a[-1])) for layer in model.decoder.layers]
    logits = run(model)[0]
    for hook in hooks:
        hook.remove()
    assert len(streams) == 2 * len(model.decoder.layers)  # run() is two passes
    assert {stream.dtype for stream in streams} == {torch.float32}
    # Nor are they bf16 values in disguise: most of a sum's low bits are not zero.
    assert all((stream.bfloat16().float() != stream).float().mean() > 0.5 for stream in streams)
    for name, parameter in model.named_parameters():
        fp32 = name.endswith(("A_log", "mixer.D", "dt_proj.bias", "dt_bias"))
        assert parameter.dtype == (torch.float32 if fp32 else torch.bfloat16), name
        assert torch.equal(parameter.detach().double().cpu(), c.parameters[name]), name  # the cast kept them
    assert torch.equal(logits, c.got[0])
    generator = torch.Generator().manual_seed(13)
    moves = (torch.empty_like(p).uniform_(-(2**-9), 2**-9, generator=generator) for p in c.parameters.values())
    with torch.no_grad():
        moved = {name: p * (1 + move) for (name, p), move in zip(c.parameters.items(), moves, strict=True)}
        moved_logits = reference_for(architecture(family)).logits(moved, batch()[0])
    bound = BF16 * (moved_logits - c.expected[0]).norm()
    if family in EXPERTS:
        bound = BF16_EXPERTS * c.expected[0].norm()
    assert (c.got[0].double().cpu() - c.expected[0]).norm() < bound


def test_bf16_norm_takes_the_stream_unrounded() -> None:
    """Its output is rounded once: by half a unit of bf16's last place, at most 2^-8, and a little for fp32."""
    norm = comparison("transformer", dtype=torch.bfloat16).model.decoder.final_norm
    x = torch.randn(64, 40, generator=torch.Generator().manual_seed(3), dtype=torch.float64).float()
    expected = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.double().cpu()
    got = norm(x.cuda())
    assert got.dtype == torch.bfloat16
    assert ((got.double().cpu() - expected).abs() <= 2**-8 * (1 + 1e-4) * expected.abs()).all()
