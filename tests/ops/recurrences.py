"""What the tests of chunked recurrences share: comparison with a loop, documents, memory, stand-ins of GPU packages."""

import sys
import types

import torch

FP32, BF16 = 1e-5, 2**-8 + 1e-5


def value_and_gradients(function, inputs, weight, starts=None):
    leaves = {name: v.detach().requires_grad_() for name, v in inputs.items()}
    y = function(**leaves, document_starts=starts)
    y.backward(weight.to(y))
    return {"y": y.detach()} | {name: v.grad for name, v in leaves.items()}


def assert_close(actual, expected, tolerance):
    """Largest difference at most `tolerance` of the largest value, for each tensor."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        difference = (actual[name].cpu().double() - value.double()).abs().max()
        assert difference <= tolerance * value.abs().max(), (name, difference, value.abs().max())


def compare(function, reference, inputs, weight, starts, device="cpu", tolerance=None):
    """Values and gradients against the reference in float64; a tensor in bf16 is held to bf16's rounding."""
    expected = value_and_gradients(reference, {n: v.double() for n, v in inputs.items()}, weight.double(), starts)
    on_device = {n: v.to(device) for n, v in inputs.items()}
    actual = value_and_gradients(function, on_device, weight, None if starts is None else starts.to(device))
    for name, value in actual.items():
        limit = tolerance or (BF16 if value.dtype == torch.bfloat16 else FP32)
        assert_close({name: value}, {name: expected[name]}, limit)


def documents_alone(function, inputs, weight, lengths):
    """The packed sequence, and its documents one by one put together; inputs of one dimension are parameters."""
    starts = torch.zeros(sum(lengths), 1, dtype=torch.bool)
    starts[torch.tensor([0, *lengths[:-1]]).cumsum(0)] = True
    packed = value_and_gradients(function, inputs, weight, starts)
    cut = {name: [v] * len(lengths) if v.dim() == 1 else v.split(lengths) for name, v in inputs.items()}
    alone = [
        value_and_gradients(function, {name: parts[k] for name, parts in cut.items()}, part)
        for k, part in enumerate(weight.split(lengths))
    ]
    return packed, {
        name: sum(r[name] for r in alone) if v.dim() == 1 else torch.cat([r[name] for r in alone])
        for name, v in packed.items()
    }


def kept_for_backward(function, inputs):
    """Bytes that a forward pass keeps for the backward pass."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    leaves = {name: v.detach().requires_grad_() for name, v in inputs.items()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(**leaves)
    return sum(kept.values())


def stand_in(monkeypatch, module_name, **attributes):
    """A module of this name in the place of the package that only GPU machines have."""
    parts = module_name.split(".")
    for n in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:n]), types.ModuleType(".".join(parts[:n])))
    vars(sys.modules[module_name]).update(attributes)
