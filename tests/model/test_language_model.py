"""The loss of the whole model: with all logits and in blocks, with label smoothing and a padded vocabulary."""

import pytest
import torch
from megatron.core.models.hybrid.hybrid_model import HybridModel
from torch import Tensor

from archscale_megatron.archs.build import build_architecture
from archscale_megatron.model import language_model
from archscale_megatron.model.language_model import HybridLanguageModel
from archscale_megatron.model.spec import build_model
from tests.model.building import config_of

pytestmark = pytest.mark.usefixtures("one_process")

VOCABULARY, PADDED, BATCH, SEQUENCE = 90, 128, 2, 13
# Of gradients; Megatron's fused loss makes bf16 ones.
TOLERANCES = {"plain": 1e-5, "kernels": 1e-5, "fused": 1e-2, "chunked": 1e-5}


def model_of(tied: bool, **options: object) -> HybridLanguageModel:
    arch = build_architecture(
        "samba", 8, aspect_ratio=5, head_dim=8, num_heads=8, num_kv_heads=4, vocab_size=VOCABULARY, tied_embeddings=tied
    )
    model = build_model(config_of(arch, **options), padded_vocab_size=PADDED, max_sequence_length=SEQUENCE, seed=1)
    weight = model.shared_embedding_or_output_weight() if tied else model.output_layer.weight
    weight.data.normal_(std=0.5, generator=torch.Generator().manual_seed(2))  # logits that are not all alike
    return model


def batch() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(VOCABULARY, (BATCH, SEQUENCE + 1), generator=torch.Generator().manual_seed(3))
    return tokens[:, :-1], tokens[:, 1:]


def in_torch(logits: Tensor, labels: Tensor, *, vocab_size: int, label_smoothing: float, tp_group: object) -> Tensor:
    """In the place of `ops.cross_entropy`, whose kernels need a GPU (and are tested beside it)."""
    log_p = logits.log_softmax(-1)
    nll = -log_p.gather(-1, labels[..., None]).squeeze(-1)
    return (1 - label_smoothing) * nll - label_smoothing * log_p[..., :vocab_size].mean(-1)


@pytest.mark.parametrize("loss", TOLERANCES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("tied", [True, False])
def test_equals_the_formula(loss: str, smoothing: float, tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """(1 - e) * nll + e * mean of -log p over the entries without padding, and the gradient of every parameter."""
    model = model_of(
        tied,
        chunked_cross_entropy=loss == "chunked",
        cross_entropy_loss_fusion=loss == "fused",
        label_smoothing=smoothing,
    )
    tokens, labels = batch()
    weights = torch.randn(BATCH, SEQUENCE, generator=torch.Generator().manual_seed(4))

    log_p = model(tokens, None, None).double().log_softmax(-1)
    assert log_p.shape == (BATCH, SEQUENCE, PADDED)
    nll = -log_p.gather(-1, labels[..., None]).squeeze(-1)
    expected = (1 - smoothing) * nll - smoothing * log_p[..., :VOCABULARY].mean(-1)
    names, parameters = zip(*model.named_parameters(), strict=True)
    expected_grads = torch.autograd.grad((expected * weights).sum(), parameters)

    if loss in ("chunked", "kernels"):
        monkeypatch.setattr(HybridModel, "compute_language_model_loss", None)  # Megatron's loss of logits
    if loss != "plain":
        monkeypatch.setattr(language_model, "cross_entropy", in_torch if loss == "kernels" else None)
    losses = model(tokens, None, None, labels=labels)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=1e-6)
    grads = torch.autograd.grad((losses * weights).sum(), parameters)
    for name, grad, expected_grad in zip(names, grads, expected_grads, strict=True):
        assert (grad - expected_grad).abs().max() <= TOLERANCES[loss] * expected_grad.abs().max(), name


def test_logits_after_a_loss() -> None:
    """Labels of one call do not stay for the next, not even if it failed."""
    model = model_of(True, chunked_cross_entropy=True)
    tokens, labels = batch()
    expected = model(tokens, None, None)
    model(tokens, None, None, labels=labels)
    assert torch.equal(model(tokens, None, None), expected)
    with pytest.raises(RuntimeError):
        model(tokens, None, None, labels=labels[:, :3])
    assert torch.equal(model(tokens, None, None), expected)
