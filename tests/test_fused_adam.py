import copy

import pytest
import torch

from archscale_megatron.fused_adam import FusedAdam

SHAPES = [(17,), (8, 5), (3, 4, 2), (1,)]


def groups(device: str = "cpu") -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in SHAPES]
    return [
        {"params": params[:2], "lr": 3e-3, "weight_decay": 0.1},
        {"params": params[2:], "lr": 1e-2, "weight_decay": 0.0, "eps": 1e-5, "betas": (0.8, 0.95)},
    ]


def train(optimizer: torch.optim.Optimizer, steps: range) -> list[torch.Tensor]:
    """Steps with the same gradients and learning rates for whoever asks; returns the parameters."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.device)
        optimizer.step()
    return [p.detach().clone() for p in params]


ON = [pytest.param("cpu", "foreach"), pytest.param("cuda", "fused", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device, implementation", ON)
@pytest.mark.parametrize("adam_w_mode, reference", [(True, torch.optim.AdamW), (False, torch.optim.Adam)])
def test_trajectory_is_torch_s_bit_for_bit(adam_w_mode, reference, device, implementation):
    options = {"lr": 1e-3, "betas": (0.9, 0.98), "eps": 1e-7, "weight_decay": 0.03}
    ours = FusedAdam(groups(device), **options, adam_w_mode=adam_w_mode)
    theirs = reference(groups(device), **options, **{implementation: True})
    start = train(ours, range(0))
    for step in range(10):
        for a, b in zip(train(ours, range(step, step + 1)), train(theirs, range(step, step + 1)), strict=True):
            assert torch.equal(a, b), f"step {step}"
    assert all(not torch.equal(a, b) for a, b in zip(start, train(ours, range(0)), strict=True))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_trajectory_is_the_formula_in_float64(device):
    """Algorithm 2 of arXiv 1711.05101 with the schedule multiplier in the learning rate."""
    optimizer = FusedAdam(groups(device))
    params = [p.detach().double() for group in groups() for p in group["params"]]
    options = [group for group in optimizer.param_groups for _ in group["params"]]
    m, v = [torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params]
    for t in range(1, 6):
        train(optimizer, range(t - 1, t))
        generator = torch.Generator().manual_seed(t - 1)
        for i, (p, group) in enumerate(zip(params, options, strict=True)):
            grad, (beta1, beta2) = torch.randn(p.shape, generator=generator).double(), group["betas"]
            m[i] = beta1 * m[i] + (1 - beta1) * grad
            v[i] = beta2 * v[i] + (1 - beta2) * grad**2
            update = (m[i] / (1 - beta1**t)) / ((v[i] / (1 - beta2**t)).sqrt() + group["eps"])
            params[i] = p - group["lr"] * (update + group["weight_decay"] * p)
    for ours, reference in zip(train(optimizer, range(0)), params, strict=True):
        torch.testing.assert_close(ours.cpu().double(), reference, rtol=1e-5, atol=1e-7)


def test_state_layout_is_transformer_engine_s():
    optimizer = FusedAdam(groups())
    train(optimizer, range(3))
    assert [group["step"] for group in optimizer.param_groups] == [3, 3]
    for p, state in optimizer.state.items():
        assert set(state) == {"exp_avg", "exp_avg_sq"}
        assert all(tensor.shape == p.shape and tensor.dtype == torch.float32 for tensor in state.values())


def test_step_counts_for_a_group_without_gradients_but_not_for_an_empty_one():
    optimizer = FusedAdam([{"params": [torch.nn.Parameter(torch.ones(2))]}, {"params": []}])
    optimizer.step()
    assert optimizer.param_groups[0]["step"] == 1
    assert "step" not in optimizer.param_groups[1]
    assert not optimizer.state


def test_loaded_state_continues_exactly():
    whole = train(FusedAdam(groups()), range(6))
    first = FusedAdam(groups())
    train(first, range(3))
    second = FusedAdam(copy.deepcopy(first.param_groups))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for a, b in zip(whole, train(second, range(3, 6)), strict=True):
        assert torch.equal(a, b)


def test_cuda_graph_capture_is_refused():
    with pytest.raises(ValueError, match="--optimizer-cuda-graph"):
        FusedAdam(groups(), capturable=True)
