"""The layer of experts against loops in float64: output, load-balancing loss, and the gradients of both."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor

from archscale_megatron.archs.architecture import Architecture
from archscale_megatron.archs.build import build_architecture
from archscale_megatron.layers.backend import backend_for
from archscale_megatron.layers.moe import MoEMixer, moe_spec
from archscale_megatron.layers.shared_state import SequenceContext, SharedState
from tests import reference
from tests.model.building import config_of
from tests.model.conftest import one_process  # noqa: F401  # a fixture

pytestmark = pytest.mark.usefixtures("one_process")

OPTIONS = {
    "plain": {"sparsity": 3, "top_k": 4},
    "shared": {"sparsity": 2, "top_k": 4, "shared_expert": True},
    "sqrt": {"sparsity": 3, "top_k": 2, "sqrt_gate": True},
    "shared sqrt": {"sparsity": 2, "top_k": 4, "shared_expert": True, "sqrt_gate": True},
}
LENGTH, BATCH, WIDTH = 11, 3, 32
COEFFICIENT, SCALE = 7.0, 3.0  # SCALE: what a schedule multiplies the loss with
EXACT = 1e-5  # of the largest value of a tensor, in fp32
BF16 = 2e-2  # the same; bf16 rounds by up to 4e-3 at each step


def architecture(kind: str) -> Architecture:
    return build_architecture("transformer_gqa4_h2_moe", 4, aspect_ratio=WIDTH // 4, head_dim=8, **OPTIONS[kind])


def layer(kind: str, **options: object) -> MoEMixer:
    """The second layer of experts of a model of four, its parameters drawn so that every part counts."""
    arch = architecture(kind)
    config = config_of(arch, moe_aux_loss_coeff=COEFFICIENT, **options)
    spec = moe_spec(backend_for(config), arch, grouped_gemm=False)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    mixer = build_module(spec, config=config, layer_number=4, pg_collection=groups, writes=())
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, parameter in sorted(mixer.named_parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5)
    return mixer


def inputs() -> tuple[Tensor, Tensor]:
    """x [s, b, w], and weights for the output, so that no two of its elements count alike."""
    generator = torch.Generator().manual_seed(3)
    x, weights = (torch.randn(LENGTH, BATCH, WIDTH, generator=generator) for _ in range(2))
    return x + 0.5, weights  # the mean makes some experts likelier for all tokens


def run(mixer: MoEMixer) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and the gradients of `SCALE` times the loss and the load-balancing loss."""
    get_moe_metrics_tracker().clear()
    MoEAuxLossAutoScaler.main_loss_backward_scale = torch.tensor(SCALE)
    x, weights = inputs()
    x.requires_grad_()
    output, bias = mixer(x.cuda(), SharedState(), SequenceContext())
    assert bias is None
    (SCALE * (output * weights.cuda()).sum()).backward()
    return output.detach(), {"x": x.grad} | {name: p.grad for name, p in mixer.named_parameters()}


def expected(mixer: MoEMixer, kind: str, coefficient: float = COEFFICIENT) -> tuple[Tensor, float, dict[str, Tensor]]:
    """Output, load-balancing loss of coefficient 1, and the gradients, by loops in float64."""
    arch = architecture(kind)
    parameters = {n: p.detach().double().cpu().requires_grad_() for n, p in mixer.named_parameters()}
    x, weights = (t.double() for t in inputs())
    x.requires_grad_()
    output, balance = reference.experts(
        x, {f"mixer.{name}": p for name, p in parameters.items()}, arch.experts_per_token, arch.sqrt_gate
    )
    (SCALE * ((output * weights).sum() + coefficient * balance)).backward()
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in parameters.items()}  # not chosen
    return output.detach(), balance.item(), {"x": x.grad} | gradients


def error(got: Tensor, reference: Tensor) -> float:
    assert got.shape == reference.shape
    return ((got.double().cpu() - reference).abs().max() / (reference.abs().max() or 1.0)).item()


def logged(name: str) -> Tensor:
    """What a layer recorded, for each of the model's layers of experts."""
    return get_moe_metrics_tracker().metrics[name].values.cpu()


@pytest.mark.parametrize("kind", OPTIONS)
def test_layer_is_the_reference(kind: str) -> None:
    mixer = layer(kind)
    output, gradients = run(mixer)
    ref_output, ref_balance, ref_gradients = expected(mixer, kind)
    assert error(output, ref_output) < EXACT
    assert gradients.keys() == ref_gradients.keys()
    errors = {name: error(gradients[name], ref_gradients[name]) for name in gradients}
    assert max(errors.values()) < EXACT, errors
    balance = logged("load_balancing_loss")
    assert balance.tolist() == pytest.approx([0, ref_balance, 0, 0], rel=EXACT)
    assert ref_balance > 1.02  # 1 is what an even load has


def test_the_load_balancing_loss_is_seen() -> None:
    """Its gradients are what the test above sees in the router's: without them it would fail."""
    mixer = layer("shared sqrt")
    gradients, without = run(mixer)[1], expected(mixer, "shared sqrt", coefficient=0.0)[2]
    assert error(gradients["router.weight"], without["router.weight"]) > 0.01


@pytest.mark.parametrize("mistake", ["weights squared", "shared expert not scaled", "softmax before top-k"])
def test_mistakes_are_seen(mistake: str) -> None:
    arch, mixer = architecture("shared sqrt"), layer("shared sqrt")
    parameters = {f"mixer.{name}": p.detach().double().cpu() for name, p in mixer.named_parameters()}
    x = inputs()[0].double()
    wrong = reference.experts(x, parameters, arch.experts_per_token, arch.sqrt_gate, mistake)[0]
    assert error(run(mixer)[0], wrong) > 0.01


def test_global_loss_of_one_rank_is_the_loss() -> None:
    """Each micro-batch counts for itself: a second one does not know of the first."""
    mixer = layer("plain", moe_router_load_balancing_type="global_aux_loss")
    _, ref_balance, ref_gradients = expected(mixer, "plain")
    mixer(-inputs()[0].cuda(), SharedState(), SequenceContext())
    gradients = run(mixer)[1]
    assert error(gradients["router.weight"], ref_gradients["router.weight"]) < EXACT
    assert logged("global_load_balancing_loss").tolist() == pytest.approx([0, ref_balance, 0, 0], rel=EXACT)
    ranks = {"tp_cp_group": SimpleNamespace(size=lambda: 2), "tp_dp_cp_group": SimpleNamespace(size=lambda: 8)}
    for name, group in ranks.items():
        setattr(mixer.router, name, group)
    assert mixer.router.get_aux_loss_coeff("global_aux_loss") == pytest.approx(4 * COEFFICIENT)


def test_evaluation_has_no_load_balancing_loss() -> None:
    mixer = layer("plain").eval()
    output, gradients = run(mixer)
    ref_output, _, ref_gradients = expected(mixer, "plain", coefficient=0.0)
    assert error(output, ref_output) < EXACT
    assert error(gradients["router.weight"], ref_gradients["router.weight"]) < EXACT
    assert not logged("load_balancing_loss").any()


def test_a_weight_of_zero_has_a_finite_gradient() -> None:
    """Of two experts whose logits are far apart, one has a probability that is 0 in fp32."""
    mixer = layer("sqrt")
    with torch.no_grad():
        mixer.router.weight.mul_(1e3)
    output, gradients = run(mixer)
    assert output.isfinite().all() and all(gradient.isfinite().all() for gradient in gradients.values())


def test_bf16_routes_in_fp32() -> None:
    mixer = layer("shared sqrt", params_dtype=torch.bfloat16, bf16=True).bfloat16()
    arch = architecture("shared sqrt")
    x = inputs()[0].bfloat16().cuda()
    weights, choices = mixer.router(x)
    logits = x.double().view(-1, WIDTH) @ mixer.router.weight.double().T
    chosen = logits.topk(arch.experts_per_token).indices.sort().values
    assert weights.dtype == torch.float32
    assert torch.equal(choices.nonzero()[:, 1].view_as(chosen), chosen)
    expected = logits.gather(1, chosen).softmax(1).sqrt()
    torch.testing.assert_close(weights.gather(1, chosen).double(), expected, rtol=EXACT, atol=0)
    parameters = {f"mixer.{name}": p.detach().double().cpu() for name, p in mixer.named_parameters()}
    output = reference.experts(x.double().cpu(), parameters, arch.experts_per_token, arch.sqrt_gate)[0]
    assert error(mixer(x, SharedState(), SequenceContext())[0], output) < BF16
