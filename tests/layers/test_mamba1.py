"""Mamba-1 with dt padded as on a GPU, against itself without; tests/model/test_reference.py has it in whole models."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.models.backends import LocalSpecProvider

from archscale_megatron.layers import mamba1
from tests.layers import mixers

pytestmark = pytest.mark.usefixtures("one_process")


def value_and_gradients(mixer, data):
    hidden = data["hidden"].clone().requires_grad_()
    output, memory = mixers.run(mixer, hidden, None, data["starts"])
    mixer.zero_grad()
    ((output * data["grad_output"]).sum() + (memory * data["grad_memory"]).sum()).backward()
    gradients = {name: p.grad.clone() for name, p in mixer.named_parameters()}
    return {"output": output.detach(), "memory": memory.detach(), "hidden": hidden.grad} | gradients


@pytest.mark.parametrize("dt_rank", [5, 8, 11])
def test_padding_changes_nothing(dt_rank, monkeypatch):
    sizes = {"d_inner": mixers.MEMORY_SIZE, "dt_rank": dt_rank, "state_size": 3, "conv_kernel": 4}
    monkeypatch.setitem(mixers.SPECS, "mamba1", mamba1.mamba1_spec(LocalSpecProvider(), **sizes))
    mixer = mixers.build_mixer("mamba1")
    for p in mixer.parameters():
        p.data = p.data.double()
    data = {name: x.double() if x.is_floating_point() else x for name, x in mixers.inputs().items()}
    widths = []
    mixer.dt_proj.register_forward_pre_hook(lambda module, inputs: widths.append(inputs[0].shape[-1]))
    plain = value_and_gradients(mixer, data)

    of_a_gpu = SimpleNamespace(is_cuda=True, element_size=lambda: 2)
    columns = mamba1._columns
    monkeypatch.setattr(mamba1, "_columns", lambda rank, x: columns(rank, of_a_gpu))
    padded = value_and_gradients(mixer, data)
    assert widths == [dt_rank, {5: 8, 8: 8, 11: 16}[dt_rank]]
    assert mixer.x_proj.weight.shape == (dt_rank + 6, 24) and mixer.dt_proj.weight.shape == (24, dt_rank)
    for name, expected in plain.items():
        tolerance = 0 if dt_rank == 8 else 1e-12
        torch.testing.assert_close(padded[name], expected, rtol=tolerance, atol=tolerance, msg=name)


def test_only_half_precision_on_a_gpu_is_padded():
    for is_cuda, size, columns in [(True, 2, 128), (True, 4, 124), (False, 2, 124), (False, 4, 124)]:
        assert mamba1._columns(124, SimpleNamespace(is_cuda=is_cuda, element_size=lambda n=size: n)) == columns
