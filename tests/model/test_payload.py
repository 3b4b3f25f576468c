"""What crosses a pipeline boundary: every bit of it, in as few bytes as promised, and its gradients back."""

import pytest
import torch

from archscale_megatron.archs.architecture import Payload
from archscale_megatron.archs.build import build_architecture
from archscale_megatron.layers.shared_state import SharedState
from archscale_megatron.model.payload import pack, packed_width, unpack
from tests.model.building import config_of

ARCH = build_architecture("sambay", 8, aspect_ratio=8, head_dim=8, vocab_size=96)
LENGTH, BATCH = 6, 3


@pytest.mark.parametrize("payload", [(), ("memory",), ("kv",), ("memory", "kv")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tp", "sp"), [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("spare", [0, 5])
def test_everything_arrives_bit_for_bit(payload: Payload, dtype: torch.dtype, tp: int, sp: bool, spare: int) -> None:
    config = config_of(ARCH, dtype, tensor_model_parallel_size=tp, sequence_parallel=sp)
    hidden = torch.randn(LENGTH // (tp if sp else 1), BATCH, ARCH.hidden_size, requires_grad=True)
    memory = torch.randn(LENGTH, BATCH, ARCH.d_inner // tp).to(dtype).requires_grad_()
    key, value = (
        torch.randn(LENGTH, BATCH, ARCH.num_query_groups // tp, ARCH.head_dim).to(dtype).requires_grad_() for _ in "kv"
    )
    state = SharedState(memory=memory, key=key, value=value)
    sent = pack(hidden, state, payload, packed_width(ARCH, payload, config) + spare)
    assert sent.dtype == torch.float32

    received = sent.detach().requires_grad_()
    hidden_there, state_there = unpack(received, payload, ARCH, config)
    pairs = [(hidden, hidden_there)]
    pairs += [(memory, state_there.memory)] if "memory" in payload else []
    pairs += [(key, state_there.key), (value, state_there.value)] if "kv" in payload else []
    assert all(here.dtype == there.dtype and torch.equal(here, there) for here, there in pairs)
    assert (state_there.memory is None) == ("memory" not in payload)

    gradients = [torch.randn(there.shape).to(there.dtype) for _, there in pairs]
    torch.autograd.backward([there for _, there in pairs], gradients)
    sent.backward(received.grad)
    assert all(torch.equal(here.grad, gradient) for (here, _), gradient in zip(pairs, gradients, strict=True))


def test_bytes_a_token() -> None:
    """4 h + 2 (d_memory + 2 kv) in bf16, shared between the tensor-parallel ranks where they share the tokens."""
    arch = build_architecture("sambay", 24)
    hidden, state = 4 * arch.hidden_size, 2 * (arch.d_inner + 2 * arch.kv_size)
    for tp, sp, expected in ((1, False, hidden + state), (2, False, hidden + state // 2), (2, True, hidden + state)):
        config = config_of(arch, torch.bfloat16, tensor_model_parallel_size=tp, sequence_parallel=sp)
        assert 4 * packed_width(arch, ("memory", "kv"), config) == expected
        assert 4 * packed_width(arch, (), config) == hidden


def test_boundaries_are_as_wide_as_they_need_in_1f1b_and_equal_when_interleaved() -> None:
    pattern = "m-W-|m-W-m|-*-U-|X-"
    config = config_of(ARCH, layer_pattern=pattern, pipeline_model_parallel_size=4)
    assert config.boundary_payloads == [(), ("memory",), ("kv",)]
    widths = [config.boundary_width(payload) for payload in config.boundary_payloads]
    assert widths == [64, 64 + 128, 64 + 2 * 16]
    config.virtual_pipeline_model_parallel_size = 2
    assert [config.boundary_width(payload) for payload in config.boundary_payloads] == [192] * 3
