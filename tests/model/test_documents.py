"""Documents packed into one sequence: each has the logits, and gives the gradients, that it has alone."""

import functools
from collections import Counter
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest
import torch
from megatron.core.models.hybrid.hybrid_model import HybridModel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from archscale_megatron.archs.architecture import MLP, MOE, SYMBOLS
from archscale_megatron.archs.families import FAMILIES
from archscale_megatron.layers import gated_delta_net, mamba1, mamba2, recurrent
from archscale_megatron.ops.documents import starts_of_documents
from tests.model.building import build
from tests.model.test_reference import MODELS, RECOMPUTE, architecture, error, randomise

pytestmark = pytest.mark.usefixtures("one_process")

END_OF_DOCUMENT = 2
# One token, shorter than the 4 taps of a convolution, longer than several windows of 5. The first row ends with the end
# of a document, the second in the middle of one.
LENGTHS = ((3, 1, 17, 1, 1, 9, 5), (12, 2, 23))
TOLERANCE = 1e-5  # in the largest value of a tensor, unless the last bits of the weights make more than that
NOTICED = 5e-3  # what a layer that ignores documents changes at least


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """tokens and labels [b, s], and a weight for each token's loss; a document's last label is in the next one."""
    generator = torch.Generator().manual_seed(13)
    text = torch.randint(END_OF_DOCUMENT + 1, 96, (len(LENGTHS), sum(LENGTHS[0]) + 1), generator=generator)
    for row, lengths in zip(text, LENGTHS, strict=True):
        row[torch.tensor(lengths).cumsum(0) - 1] = END_OF_DOCUMENT
    text[1, -2] = END_OF_DOCUMENT + 1
    return text[:, :-1], text[:, 1:], torch.rand(text[:, 1:].shape, generator=generator)


def run(model: HybridModel, tokens: Tensor, labels: Tensor, weights: Tensor, starts: Tensor | None) -> Tensor:
    """logits [b, s, vocabulary]; the gradients of the weighted loss are added to the parameters'."""
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    with torch.no_grad():
        logits = model(tokens, positions, starts)
    (model(tokens, positions, starts, labels=labels) * weights).sum().backward()
    return logits


def packed_logits(model: HybridModel) -> Tensor:
    tokens, labels, weights = (x.cuda() for x in batch())
    return run(model, tokens, labels, weights, starts_of_documents(tokens, END_OF_DOCUMENT))


def gradients(model: HybridModel) -> dict[str, Tensor]:
    """The gradients, which are cleared."""
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


@dataclass(frozen=True)
class Alone:
    """What a model computes of one document after the other."""

    model: HybridModel
    logits: Tensor
    gradients: dict[str, Tensor]


@functools.cache
def alone(family: str) -> Alone:
    model = build(architecture(family))
    randomise(model)
    rows = []
    for row, lengths in enumerate(LENGTHS):
        documents = zip(*(x[row : row + 1].cuda().split(lengths, dim=1) for x in batch()), strict=True)
        rows.append(torch.cat([run(model, *document, None) for document in documents], dim=1))
    return Alone(model, torch.cat(rows), gradients(model))


@pytest.mark.parametrize("family", MODELS)
def test_a_packed_document_is_as_if_alone(family: str) -> None:
    expected = alone(family)
    found = worst_difference(expected)
    if found >= TOLERANCE:  # gated delta nets multiply roundings by 50: see test_reference.py
        generator = torch.Generator().manual_seed(17)
        with torch.no_grad():
            for p in expected.model.parameters():
                moves = torch.empty(p.shape, dtype=torch.float64).uniform_(-(2**-24), 2**-24, generator=generator)
                p.copy_(p.double() * (1 + moves.to(p.device)))
        assert found < 2 * worst_difference(expected)
        alone.cache_clear()


def worst_difference(expected: Alone) -> float:
    """Of the logits and gradients of the packed documents from those of each alone."""
    logits = packed_logits(expected.model)
    found = gradients(expected.model)
    errors = [error(found[name], g.double().cpu()) for name, g in expected.gradients.items()]
    return max(error(logits, expected.logits.double().cpu()), *errors)


def mixes_tokens(family: str) -> str:
    """The symbols of layers in which a token sees others."""
    pattern = FAMILIES[family](8).pattern
    return "".join(s for s in SYMBOLS if s in pattern and s not in (MLP, MOE, "U"))


class CountCalls(TorchDispatchMode):
    """Of each operation of aten."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[op.overloadpacket.__name__] += 1
        return op(*args, **kwargs or {})


@pytest.mark.parametrize("recompute", [{}, *RECOMPUTE.values()])
def test_boundaries_are_found_once_for_all_layers_and_both_passes(recompute: dict[str, Any]) -> None:
    """On a GPU, to find them is to wait for all that runs there."""
    model = build(architecture("mambay2"), **recompute)  # Mamba-1's scan has its own way on a CPU
    with CountCalls() as counted:
        packed_logits(model)
    assert counted.calls["nonzero"] == 1


@pytest.mark.parametrize(("family", "symbol"), [(f, s) for f in FAMILIES for s in mixes_tokens(f)])
def test_a_layer_that_ignores_documents_is_noticed(family: str, symbol: str) -> None:
    expected = alone(family)
    model, pattern = expected.model, expected.model.config.architecture.pattern
    forget = lambda _, inputs: (*inputs[:2], replace(inputs[2], document_starts=None))  # noqa: E731
    layers = (layer for layer, s in zip(model.decoder.layers, pattern, strict=True) if s == symbol)
    hooks = [layer.register_forward_pre_hook(forget) for layer in layers]
    logits = packed_logits(model)
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    assert error(logits, expected.logits.double().cpu()) > NOTICED


@pytest.mark.parametrize(
    ("family", "module", "op"),
    [
        ("mamba", mamba1, "selective_scan"),
        ("mambay2", mamba2, "ssd"),
        ("gdny", gated_delta_net, "gated_delta_rule"),
        *((family, recurrent, "causal_conv1d") for family in ("mamba", "mambay2", "gdny")),
    ],
)
def test_half_a_mixer_that_ignores_documents_is_noticed(
    family: str, module: ModuleType, op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = alone(family)
    whole = getattr(module, op)
    monkeypatch.setattr(module, op, lambda *args, document_starts, **options: whole(*args, **options))
    logits = packed_logits(expected.model)
    expected.model.zero_grad()
    assert error(logits, expected.logits.double().cpu()) > NOTICED
