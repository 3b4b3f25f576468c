"""The model class of exports: against `tests/reference.py` in float64, and its ways to compute against each other."""

import functools
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from archscale_megatron.archs.families import FAMILIES
from archscale_megatron.hf import modeling_archscale as modeling
from archscale_megatron.hf.auto import register
from archscale_megatron.hf.modeling_archscale import ArchScaleCache, ArchScaleForCausalLM
from tests.hf.models import MODELS, VOCABULARY, architecture, build, reference_of, reference_parameters

BATCH, SEQUENCE = 2, 23  # several windows
EXACT = 1e-12  # float64
# One model for each kind of layer and of state, for tests of what has nothing to do with the rest of a family.
KINDS = ("transformersa", "sambaywr", "sambay2", "sgdny", "sambaymlp", "phi4miniflash", "sambay_gqa4_moe")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as models are so small that a second one only waits
    yield
    torch.set_num_threads(threads)


@functools.cache
def model_of(name: str, tied: bool = True) -> ArchScaleForCausalLM:
    return build(architecture(name, tied))


def tokens(rows: int = BATCH, length: int = SEQUENCE, seed: int = 11) -> Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


@functools.cache
def full_logits(name: str, tied: bool = True) -> Tensor:
    with torch.no_grad():
        return model_of(name, tied)(tokens(), use_cache=False).logits


def error(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return ((got - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied with multipliers"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits_are_the_reference_s(name: str, tied: bool) -> None:
    model = model_of(name, tied)
    expected = reference_of(architecture(name, tied)).logits(reference_parameters(model), tokens())
    assert error(full_logits(name, tied), expected) < EXACT


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_chunks_steps_and_last_logits_are_the_whole(name: str) -> None:
    """A prompt in several pieces, tokens one by one, and the last logits alone."""
    cache, logits = ArchScaleCache(), []
    for chunk in tokens().split([7, 1, 1, 6, 1, 7], dim=1):
        logits.append(model_of(name)(chunk, past_key_values=cache).logits)
    assert error(torch.cat(logits, 1), full_logits(name)) < EXACT
    assert cache.get_seq_length() == SEQUENCE
    last = model_of(name)(tokens(), logits_to_keep=1)
    assert error(last.logits, full_logits(name)[:, -1:]) < EXACT
    step = model_of(name)(tokens(seed=12)[:, :1], past_key_values=last.past_key_values)  # no state was skipped
    assert error(step.logits, model_of(name)(tokens(seed=12)[:, :1], past_key_values=cache).logits) < EXACT


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_padding_on_the_left_changes_nothing(name: str) -> None:
    """Neither in a prompt, nor in what follows it; the rows have paddings of 6 and 0 tokens."""
    prompt, mask = tokens(length=SEQUENCE).clone(), torch.ones(BATCH, SEQUENCE, dtype=torch.long)
    mask[0, :6] = 0
    cache, logits, model = ArchScaleCache(), [], model_of(name)
    for start, stop in ((0, 4), (4, 15), (15, 16), (16, SEQUENCE)):
        chunk = model(prompt[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache)
        logits.append(chunk.logits)
    padded = torch.cat(logits, 1)
    assert error(padded[:1, 6:], model(prompt[:1, 6:]).logits) < EXACT
    assert error(padded[1:], full_logits(name)[1:]) < EXACT
    assert error(model(prompt, attention_mask=mask, logits_to_keep=2).logits, padded[:, -2:]) < EXACT


@torch.no_grad()
def test_no_row_of_scores_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even that of padding: to some kernels it is 0 / 0, which would spread through the recurrent layers."""
    masks, attention = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: masks.append(a[3]) or attention(*a, **k))
    mask = torch.ones(BATCH, SEQUENCE).index_fill(1, torch.arange(6), 0)
    model_of("sambay")(tokens(), attention_mask=mask)
    assert masks and all(x.any(-1).all() for x in masks)


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_generate_with_cache_is_recomputing(name: str) -> None:
    """Token for token: of one prompt, and of two of different lengths, whose logits are those of their rows alone."""
    model, options = model_of(name, False), {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    prompt, mask = tokens(length=9), torch.ones(BATCH, 9, dtype=torch.long)
    mask[0, :4] = 0
    together = model.generate(prompt, attention_mask=mask, **options)
    expected = model.generate(prompt, attention_mask=mask, use_cache=False, **options)
    alone = model.generate(prompt[:1, 4:], **options)
    assert len(set(together[1, 9:].tolist())) > 2
    assert torch.equal(together, expected)
    assert torch.equal(together[:1, 4:], alone)


@pytest.mark.parametrize("name", KINDS)
@torch.inference_mode()
def test_other_ways_to_generate(name: str) -> None:
    """Beams, samples, chunks of the prompt, a second turn with the cache of the first, prompts of embeddings."""
    model = model_of(name, False)
    mask = torch.ones(BATCH, 9, dtype=torch.long)
    mask[1, :3] = 0
    prompt = {"input_ids": tokens(length=9), "attention_mask": mask}
    greedy: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    for options in ({"num_beams": 3}, {"do_sample": True, "top_k": 5, "temperature": 2.0}):
        outputs = []
        for use_cache in (True, False):
            torch.manual_seed(3)
            outputs.append(model.generate(**prompt, **greedy | options, use_cache=use_cache))
        assert torch.equal(*outputs)
    first = model.generate(**prompt, **greedy, return_dict_in_generate=True)
    assert torch.equal(model.generate(**prompt, **greedy, prefill_chunk_size=4), first.sequences)
    inputs_embeds = model.get_input_embeddings()(prompt["input_ids"])
    from_embeddings = model.generate(inputs_embeds=inputs_embeds, attention_mask=mask, **greedy)
    assert torch.equal(from_embeddings, first.sequences[:, 9:])

    turn = torch.cat([first.sequences, tokens(length=5, seed=5)], 1)
    mask = F.pad(mask, (0, turn.shape[1] - 9), value=1)
    second = model.generate(turn, attention_mask=mask, past_key_values=first.past_key_values, **greedy)
    assert torch.equal(second, model.generate(turn, attention_mask=mask, **greedy))


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_states_are_as_large_as_they_need_be(name: str) -> None:
    """A window keeps as many tokens as it reaches back, full attention all, recurrent layers the same at every step,
    and no other layer anything; the storage behind a state is no larger than it."""
    arch, cache = architecture(name), ArchScaleCache()
    values, taps, keys = arch.mamba2_d_inner, arch.conv_kernel - 1, arch.gdn_key_size
    recurrent = {
        "m": [(taps, arch.d_inner), (arch.d_inner, arch.state_size)],
        "M": [
            (taps, values + 2 * arch.mamba2_state_size),
            (arch.mamba2_heads, arch.mamba2_state_size, arch.mamba2_head_dim),
        ],
        "G": [(taps, 4 * keys), (arch.gdn_heads, arch.gdn_head_dim, 2 * arch.gdn_head_dim)],
    }
    model_of(name)(tokens(), past_key_values=cache, logits_to_keep=1)
    for seen in range(SEQUENCE, SEQUENCE + 3):
        assert set(cache.states) == {i for i, symbol in enumerate(arch.pattern) if symbol in "mMGW*"}
        for layer, state in cache.states.items():
            symbol = arch.pattern[layer]
            if symbol in recurrent:
                assert [x.shape[1:] for x in state] == recurrent[symbol]
            else:
                window = arch.window if symbol == "W" else arch.full_window
                kept = seen if window is None else window - 1
                assert [x.shape[2] for x in state] == [kept, kept]
                assert sum(x.numel() for x in state) == BATCH * kept * 2 * arch.kv_size
            assert all(x.untyped_storage().nbytes() == x.numel() * x.element_size() for x in state)
        model_of(name)(tokens(length=1), past_key_values=cache)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_layers_behind_the_last_that_mixes_see_the_last_token_alone(name: str) -> None:
    model, seen = model_of(name), []
    hooks = [layer.register_forward_hook(lambda *a: seen.append(a[-1].shape[1])) for layer in model.model.layers]
    model(tokens(), logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    mixing = 1 + max(i for i, symbol in enumerate(model.config.pattern) if symbol in "mMGW*")
    assert seen == [SEQUENCE] * mixing + [1] * (len(model.config.pattern) - mixing)


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients(name: str) -> None:
    """The mean loss of the next tokens, and the gradient of every parameter, are the reference's."""
    model, parameters = model_of(name), dict(model_of(name).named_parameters())
    labels = tokens().masked_fill(tokens() == 3, -100)
    model.train()
    output = model(tokens(), labels=labels)
    model.eval()
    assert output.past_key_values is None
    logits = reference_of(architecture(name)).logits(reference_parameters(model), tokens())
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-6)  # transformers takes it in fp32
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3), dtype=logits.dtype)
    both = [
        torch.autograd.grad((x * weights).sum(), tuple(parameters.values()), allow_unused=True)
        for x in (output.logits, logits)
    ]
    for parameter, got, wanted in zip(parameters, *both, strict=True):
        assert (got is None) == (wanted is None), parameter  # of an expert that no token chose
        # The gradient of a bias of keys is zero, but for roundings.
        assert got is None or (got - wanted).abs().max() < 1e-10 * wanted.abs().max() + 1e-13, parameter


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_bf16(name: str) -> None:
    """What training keeps in fp32 is fp32. To move the parameters in float64 as far as bf16 rounds activations makes
    about half of the difference in the logits that bf16 does; but some tokens choose other experts."""
    model = build(architecture(name), torch.bfloat16)
    streams: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda *a: streams.append(a[-1])) for layer in model.model.layers]
    cache = ArchScaleCache()
    logits = torch.cat([model(chunk, past_key_values=cache).logits for chunk in tokens().split([20, 1, 2], 1)], 1)
    for hook in hooks:
        hook.remove()
    assert {x.dtype for x in streams} == {torch.float32} and logits.dtype == torch.bfloat16
    unrounded = model_of(name).state_dict()
    for parameter, values in model.state_dict().items():
        fp32 = parameter.endswith(("A_log", "mixer.D", "dt_proj.bias", "dt_bias"))
        assert values.dtype == (torch.float32 if fp32 else torch.bfloat16), parameter
        assert torch.equal(values, unrounded[parameter].to(values.dtype)), parameter
    for layer, state in cache.states.items():
        scan = model.config.pattern[layer] in "mMG"
        assert [x.dtype for x in state] == [torch.bfloat16, torch.float32 if scan else torch.bfloat16]

    exact = model.double()(tokens()).logits
    generator = torch.Generator().manual_seed(13)
    for values in model.parameters():
        values.mul_(1 + torch.empty_like(values).uniform_(-(2**-9), 2**-9, generator=generator))
    bound = 2 * (model(tokens()).logits - exact).norm()
    if "moe" in name:
        bound = 0.3 * exact.norm()
    assert (logits.double() - exact).norm() < bound


@torch.no_grad()
def test_hidden_states() -> None:
    model = model_of("phi4miniflash")
    output = model(tokens(), output_hidden_states=True, logits_to_keep=1)
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    assert {x.shape for x in output.hidden_states} == {(BATCH, SEQUENCE, model.config.hidden_size)}
    assert torch.equal(output.hidden_states[0], model.get_input_embeddings()(tokens()))
    assert torch.equal(model.lm_head(output.hidden_states[-1][:, -1:]), output.logits)
    as_tuple = model(tokens(), return_dict=False)
    assert isinstance(as_tuple, tuple) and error(as_tuple[0], full_logits("phi4miniflash")) < EXACT
    chosen = model(tokens(), logits_to_keep=torch.tensor([3, 5])).logits
    assert error(chosen, full_logits("phi4miniflash")[:, [3, 5]]) < EXACT


@torch.no_grad()
def test_initial_values() -> None:
    """A new model is no better than chance, and its scans' parameters are as at the start of training."""
    torch.manual_seed(0)
    for name in ("sambay", "sambay2", "sgdny", "phi4miniflash", "transformersa"):
        model = ArchScaleForCausalLM(build(architecture(name)).config)
        assert model(tokens(), labels=tokens()).loss.item() == pytest.approx(math.log(VOCABULARY), abs=0.1)
        for parameter, values in model.named_parameters():
            assert values.isfinite().all()
            if parameter.endswith(("dt_bias", "dt_proj.bias")):
                assert ((F.softplus(values) > 9e-4) & (F.softplus(values) < 0.11)).all()
            elif parameter.endswith("A_log"):
                assert values.min() >= 0 and values.max() <= math.log(16) + 1e-6


def mixed_step() -> dict[str, Tensor]:
    """Inputs of the three scans, with padding: b 2, s 70 (two chunks), h 2, n 3, p 4."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    dt = normal(2, 70, 2)
    dt[0, :5] = -torch.inf  # padding
    return {"x": normal(2, 70, 2, 4), "dt": dt, "B": normal(2, 70, 3), "C": normal(2, 70, 3), "k": normal(2, 70, 2, 3)}


def selective_scan_fn(u, delta, A, B, C, D, delta_softplus, return_last_state):
    """mamba_ssm's, in loops: u, delta [b, d, s], B, C [b, n, s]."""
    assert delta_softplus and return_last_state
    h, y = u.new_zeros(*u.shape[:2], A.shape[1]), []
    for t in range(u.shape[2]):
        step = F.softplus(delta[:, :, t])
        h = (step[..., None] * A).exp() * h + (step * u[:, :, t])[..., None] * B[:, None, :, t]
        y.append((h * C[:, None, :, t]).sum(-1) + D * u[:, :, t])
    return torch.stack(y, 2), h


def mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, D, dt_softplus, return_final_states):
    """mamba_ssm's, in loops: x [b, s, h, p], dt [b, s, h], B, C [b, s, 1, n] -> y and the state [b, h, p, n]."""
    assert dt_softplus and return_final_states and chunk_size
    h, y = x.new_zeros(len(x), *x.shape[2:], B.shape[3]), []
    for t in range(x.shape[1]):
        step = F.softplus(dt[:, t])
        h = (step * A).exp()[..., None, None] * h + (step[..., None] * x[:, t])[..., None] * B[:, t, :, None]
        y.append((h * C[:, t, :, None]).sum(-1) + D[:, None] * x[:, t])
    return torch.stack(y, 1), h


def chunk_gated_delta_rule(q, k, v, g, beta, output_final_state, use_qk_l2norm_in_kernel):
    """FLA's, in loops: q, k [b, s, h, dk], v [b, s, h, dv], g, beta [b, s, h] -> o and the state [b, h, dk, dv]."""
    assert output_final_state and use_qk_l2norm_in_kernel
    q, k = (x.float() / (x.float().square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    S, o = v.new_zeros(len(v), v.shape[2], k.shape[3], v.shape[3], dtype=torch.float32), []
    for t in range(v.shape[1]):
        S = g[:, t].float().exp()[..., None, None] * S
        new = beta[:, t, :, None].float() * (v[:, t].float() - (S * k[:, t, :, :, None]).sum(2))
        S = S + k[:, t, :, :, None] * new[:, :, None]
        o.append((S * q[:, t, :, :, None]).sum(2) / k.shape[3] ** 0.5)
    return torch.stack(o, 1).to(v.dtype), S


def flash_attn_func(q, k, v, softmax_scale, causal, window_size):
    """flash-attn's, with all scores: [b, s, heads, d] of the last s of the keys."""
    assert causal and q.shape[3] == k.shape[3] == v.shape[3]
    group, s, n = q.shape[2] // k.shape[2], q.shape[1], k.shape[1]
    k, v = (x.repeat_interleave(group, 2) for x in (k, v))
    back = torch.arange(n - s, n)[:, None] - torch.arange(n)
    seen = (back >= 0) & ((back <= window_size[0]) | (window_size[0] < 0))
    scores = torch.einsum("bshd,bnhd->bhsn", q, k) * softmax_scale
    return torch.einsum("bhsn,bnhd->bshd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("with_gradients", [False, True])
def test_selective_scan_in_small_pieces(monkeypatch: pytest.MonkeyPatch, with_gradients: bool) -> None:
    """As on a CPU with a large state; the state that is given stays as it was."""
    i, A, D = mixed_step(), -torch.ones(2, 3, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    state = torch.ones(len(i["dt"]), 2, 3, dtype=torch.float64)
    found = []
    for steps in (100, 4, 1):
        monkeypatch.setattr(modeling, "SCAN_STATES", steps * state.numel())
        with torch.set_grad_enabled(with_gradients):
            found.append(modeling.selective_scan(i["x"][..., 0], i["dt"], A, i["B"], i["C"], D, state))
    for pieces in found[1:]:
        torch.testing.assert_close(pieces, found[0], rtol=1e-12, atol=1e-12)
    assert i["dt"].shape[1] > 4 and torch.equal(state, torch.ones_like(state))


@torch.no_grad()
def test_optional_kernels_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is handed to them, and what is made of their results, with the packages' documented layouts."""
    i, A, D = mixed_step(), -torch.arange(1.0, 3, dtype=torch.float64), torch.tensor([0.5, 2.0], dtype=torch.float64)
    beta, bf16 = 2 * torch.sigmoid(i["dt"]).float(), {name: i[name].bfloat16() for name in "xk"}
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(2, h, 9, d, generator=generator).bfloat16() for h, d in ((4, 6), (2, 6), (2, 8)))
    sink = torch.randn(4, generator=generator)

    def outputs() -> list[tuple[float, Any]]:
        """(Tolerance, results)."""
        channel_A = A[:, None] * torch.ones(2, 3, dtype=torch.float64)
        return [
            (1e-12, modeling.selective_scan(i["x"][..., 0], i["dt"], channel_A, i["B"], i["C"], D, None)),
            (1e-12, modeling.ssd(i["x"], i["dt"], A, i["B"], i["C"], D, None)),
            (
                2e-2,
                modeling.gated_delta_rule(
                    bf16["k"], bf16["k"].flip(1), bf16["x"], torch.full_like(beta, -0.1), beta, None
                ),
            ),
            (2e-2, (modeling.attend(q, k, v, 0.4, None, None, sink),)),
            (2e-2, (modeling.attend(q[:, :, -2:], k, v, 0.4, 4, None, None),)),
        ]

    plain = outputs()
    stubs = {
        "mamba_ssm.ops.selective_scan_interface": SimpleNamespace(selective_scan_fn=selective_scan_fn),
        "mamba_ssm.ops.triton.ssd_combined": SimpleNamespace(mamba_chunk_scan_combined=mamba_chunk_scan_combined),
        "fla.ops.gated_delta_rule": SimpleNamespace(chunk_gated_delta_rule=chunk_gated_delta_rule),
        "flash_attn": SimpleNamespace(flash_attn_func=flash_attn_func),
    }
    used = []
    monkeypatch.setattr(modeling, "kernels", lambda name, x: used.append(name) or stubs[name])
    for (tolerance, expected), (_, got) in zip(plain, outputs(), strict=True):
        assert all(error(x.double(), y.double()) < tolerance for x, y in zip(got, expected, strict=True))
    assert set(used) == set(stubs)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(tokens(), attention_mask=torch.ones(BATCH, 3)), r"attention_mask \[2, 3\]: give \[2, 23\]"),
        (lambda m: m(tokens(), position_ids=tokens()), "position_ids"),
        (lambda m: m(), "input_ids or inputs_embeds"),
        (lambda m: type(m.config)(depth=2, pattern="m-Q-"), "pattern 'm-Q-'"),
        (lambda m: type(m.config)(depth=2, pattern="*-U-"), "no layer of mMG before the first U"),
    ],
)
def test_what_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(model_of("sambay"))


def save(model: ArchScaleForCausalLM, directory: Path) -> None:
    """As an export is: with the code beside the weights."""
    model.config.auto_map = {
        "AutoConfig": "configuration_archscale.ArchScaleConfig",
        "AutoModelForCausalLM": "modeling_archscale.ArchScaleForCausalLM",
    }
    model.save_pretrained(directory)
    for name in ("configuration_archscale.py", "modeling_archscale.py"):
        (directory / name).write_text(Path(modeling.__file__).with_name(name).read_text())


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@torch.no_grad()
def test_saved_and_loaded(tmp_path: Path, tied: bool) -> None:
    """Bit for bit, in both precisions, by our own class: the folder's code is not run."""
    model = build(architecture("sambay_gqa4_moe", tied), torch.float32)
    save(model, tmp_path)
    (tmp_path / "modeling_archscale.py").write_text("raise RuntimeError('ran')")
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) is not tied
    register()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is ArchScaleForCausalLM and not loaded.training
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    assert loaded.generation_config.top_k == 50  # transformers' own: not the number of experts
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(values, model.state_dict()[name]) for name, values in loaded.state_dict().items())
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, values in model.bfloat16().state_dict().items():
        assert half.state_dict()[name].dtype == values.dtype and torch.equal(half.state_dict()[name], values), name


ALONE = """
import sys
sys.modules["archscale_megatron"] = sys.modules["megatron"] = None  # an import of them fails
import torch
from transformers import AutoModelForCausalLM
folder, *prompt = sys.argv[1:]
try:
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
except ValueError as error:
    assert "trust_remote_code" in str(error), error
else:
    raise AssertionError("loaded without being trusted")
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules.")
print(*model.generate(torch.tensor([[int(x) for x in prompt]]), max_new_tokens=10, do_sample=False)[0].tolist())
"""


def test_the_files_need_nothing_of_ours(tmp_path: Path) -> None:
    """In a process that cannot import the package; and transformers refuses to run them unasked."""
    model, folder, prompt = build(architecture("phi4miniflash"), torch.float32), tmp_path / "export", [5, 9, 2]
    save(model, folder)
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", ALONE, folder, *map(str, prompt)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=10, do_sample=False)[0].tolist()
    assert [int(x) for x in done.stdout.split()] == expected


def test_every_family_is_here() -> None:
    assert set(FAMILIES) <= set(MODELS)
