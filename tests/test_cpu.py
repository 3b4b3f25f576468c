"""cpu.py: checked in processes of their own, since `install()` changes the process it is called in.

This file is also the script that those processes run: `python test_cpu.py <check> ...`.
"""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from tests.launch import ROOT, torchrun

PASSED = "passed: "


def run_checks(checks: list[str], processes: int = 0) -> str:
    """Run functions of this file in a new process, or in `processes` of torchrun; returns what they
    printed."""
    if processes:
        return torchrun(processes, "-m", "tests.test_cpu", *checks, check=False).stdout
    command = [sys.executable, __file__, *checks]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    return result.stdout + result.stderr


# --- where CUDA exists --------------------------------------------------------------------------------------


def check_cuda_machine() -> None:
    """install() on a machine that has CUDA: not an attribute, not an environment variable changes."""
    from archscale_megatron import cpu

    torch.cuda.is_available = lambda: True
    places = [
        torch,
        torch.cuda,
        torch.cuda.random,
        torch.cuda.memory,
        torch.cuda.nvtx,
        torch.Tensor,
        torch.nn.Module,
    ]

    def snapshot() -> list:
        return [os.environ.copy(), sys.modules.copy(), *(dict(vars(place)) for place in places)]

    before = snapshot()
    sys.modules["megatron.core"] = sys.modules["archscale_megatron.cpu"]  # imported before: no error either
    assert cpu.install() is False
    del sys.modules["megatron.core"]
    for old, new in zip(before, snapshot(), strict=True):
        assert old.keys() == new.keys()
        assert all(old[name] is new[name] or old[name] == new[name] for name in old)
    assert cpu.ACTIVE is False


def check_late_install() -> None:
    """install() after megatron.core was imported: one error, nothing changed."""
    from archscale_megatron import cpu

    sys.modules["megatron.core"] = sys.modules["archscale_megatron.cpu"]
    tensor_to = torch.Tensor.to
    with pytest.raises(RuntimeError, match="before the first import of megatron"):
        cpu.install()
    assert torch.Tensor.to is tensor_to and not cpu.ACTIVE
    del sys.modules["megatron.core"]
    assert cpu.install() is True
    patched = torch.Tensor.to
    assert cpu.install() is True and torch.Tensor.to is patched  # a second call does nothing


# --- one process --------------------------------------------------------------------------------------------


def check_cuda_means_cpu() -> None:
    cpu = torch.device("cpu")
    for device in (
        "cuda",
        "cuda:3",
        torch.device("cuda"),
        torch.device("cuda", 1),
        torch.cuda.current_device(),
    ):
        x = torch.ones(2, 3, device=device)
        assert x.device == cpu
        assert torch.zeros_like(x, device=device).device == cpu
        assert x.to(device) is x and x.to(device=device) is x
        assert x.to(device, torch.float64).dtype == torch.float64
        assert x.to(device, non_blocking=True, dtype=torch.int32).dtype == torch.int32
    module = torch.nn.Linear(2, 2)
    assert module.cuda() is module and module.to("cuda") is module and module.weight.device == cpu
    x = torch.ones(2, requires_grad=True)
    x.cuda().pin_memory().to("cuda").sum().backward()
    assert torch.equal(x.grad, torch.ones(2))


def check_torch_is_unchanged_otherwise() -> None:
    x = torch.arange(6.0).view(2, 3)
    assert torch.tensor([1.5], device=None).tolist() == [1.5]
    assert x.to(torch.float64).dtype == x.to(torch.zeros(1, dtype=torch.float64)).dtype == torch.float64
    assert x.to(torch.device("cpu"), torch.float16, copy=True).dtype == x.to("cpu", torch.float16).dtype
    assert x.to(copy=True) is not x and x.to("meta").is_meta and x.to(device="meta").is_meta
    assert x.type(torch.float64).dtype == x.type(torch.DoubleTensor).dtype == x.type("torch.DoubleTensor").dtype
    with torch.device("meta"):
        assert torch.empty(2).is_meta and torch.nn.Linear(2, 2).weight.is_meta
        assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.nn.Linear(2, 2, device="meta").weight.is_meta
    linear = torch.nn.Linear(3, 3).to(torch.float64)
    assert torch.nn.Linear(3, 3).to(torch.device("cpu"), torch.float64)(x.double()).dtype == torch.float64
    optimizer = torch.optim.AdamW(linear.parameters())
    linear(x.double()).sum().backward()
    optimizer.step()
    loader = torch.utils.data.DataLoader(torch.arange(8), batch_size=4, shuffle=True, num_workers=1)
    assert sorted(torch.cat(list(loader)).tolist()) == list(range(8))
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    with torch.random.fork_rng():
        torch.rand(100)
    assert torch.equal(torch.rand(4), expected)


def check_type_names_for_megatron() -> None:
    """The strings that Megatron's optimizers compare, and the way back."""
    for dtype, name in [(torch.float32, "Float"), (torch.bfloat16, "BFloat16"), (torch.float16, "Half")]:
        x = torch.ones(2, dtype=dtype)
        assert x.type() == f"torch.cuda.{name}Tensor"
        assert torch.ones(2, dtype=torch.float64).type(x.type()).dtype == dtype


def check_generator() -> None:
    """The CUDA generator is the CPU generator, with torch.cuda's own functions."""
    torch.cuda.manual_seed(3)
    expected = torch.rand(5)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(5), expected)
    state = torch.cuda.get_rng_state()
    assert torch.equal(state, torch.get_rng_state())
    first, second = torch.rand(5), torch.rand(5)
    assert not torch.equal(first, second)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(5), first) and torch.equal(torch.rand(5, device="cuda"), second)


def check_device_streams_memory() -> None:
    import time

    assert torch.cuda.is_available() is False and torch.cuda.is_initialized() and torch.cuda.device_count() == 1
    torch.cuda.set_device(0)
    torch.cuda.synchronize()
    stream, start, end = torch.cuda.Stream(device=0), torch.cuda.Event(enable_timing=True), torch.cuda.Event()
    with torch.cuda.stream(stream):
        start.record()
        time.sleep(0.02)
        end.record(torch.cuda.current_stream())
    stream.wait_event(end)
    stream.wait_stream(torch.cuda.current_stream())
    torch.ones(1).record_stream(stream)
    assert 20 <= start.elapsed_time(end) < 2000 and stream.record_event().query()
    assert torch.cuda.memory_allocated() == torch.cuda.memory_stats()["allocated_bytes.all.current"] == 0
    assert torch.cuda.get_device_properties(0).major == torch.cuda.get_device_capability()[0] == 0


def check_fused_functions_are_not_compiled() -> None:
    import megatron.core.fusions.fused_bias_swiglu as fused

    x = torch.randn(3, 8)
    a, b = x.chunk(2, -1)
    torch.testing.assert_close(fused.swiglu(x), torch.nn.functional.silu(a) * b)
    assert "torch._inductor.compile_fx" not in sys.modules


# --- two processes ------------------------------------------------------------------------------------------


def check_tensor_parallel_random_states() -> None:
    """Outside the tracker's fork all ranks draw the same, inside each its own; the fork leaves no trace."""
    from megatron.core import tensor_parallel

    model_parallel(tensor=2)
    tracker = tensor_parallel.get_cuda_rng_tracker()
    expected = gather(torch.rand(4))
    tensor_parallel.model_parallel_cuda_manual_seed(123)
    plain = gather(torch.rand(4))
    assert torch.equal(plain[0], plain[1]) and not torch.equal(plain, expected)
    tensor_parallel.model_parallel_cuda_manual_seed(123)
    with tracker.fork():
        forked = gather(torch.rand(4))
    assert not torch.equal(forked[0], forked[1])
    assert torch.equal(gather(torch.rand(4)), plain)
    with tracker.fork():
        assert not torch.equal(gather(torch.rand(4)), forked)


def check_recompute_with_dropout() -> None:
    """Dropout and full recompute under tensor parallelism: loss and every gradient, to the last bit."""
    from megatron.core import tensor_parallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    model_parallel(tensor=2)
    tokens = torch.arange(32).view(2, 16) % 64

    def loss_and_gradients(**recompute: object) -> list[torch.Tensor]:
        tensor_parallel.model_parallel_cuda_manual_seed(7)
        torch.manual_seed(7)
        config = TransformerConfig(
            num_layers=2,
            hidden_size=32,
            num_attention_heads=4,
            hidden_dropout=0.2,
            attention_dropout=0.2,
            tensor_model_parallel_size=2,
            **recompute,
        )
        model = GPTModel(config, get_gpt_layer_local_spec(), vocab_size=64, max_sequence_length=16)
        loss = model(tokens, torch.arange(16).expand(2, 16), None, labels=tokens).mean()
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters())]

    plain = loss_and_gradients()
    recomputed = loss_and_gradients(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    assert len(plain) > 20
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


def check_pipeline_messages() -> None:
    from megatron.core import ModelParallelConfig, parallel_state
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    model_parallel(pipeline=2)
    config = ModelParallelConfig(pipeline_model_parallel_size=2, pipeline_dtype=torch.float32)
    group = parallel_state.get_pipeline_model_parallel_group()
    communicator, first = P2PCommunicator(group, config), group.rank() == 0
    forward, backward = torch.full((3, 2), 1.5), torch.full((3, 2), -2.5)
    if first:
        received = communicator.send_forward_recv_backward(forward, (3, 2), is_last_stage=False)
    else:
        received = communicator.recv_forward((3, 2), is_first_stage=False)
        communicator.send_backward(backward, is_first_stage=False)
    assert torch.equal(received, backward if first else forward)


def check_distributed_optimizer() -> None:
    """Data parallelism and the distributed optimizer: one step is AdamW's on the mean gradient (fp32)."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import Float16Module, MegatronModule

    model_parallel()
    rank = torch.distributed.get_rank()
    x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1))  # a batch for each rank

    class Model(MegatronModule):
        def __init__(self, config: TransformerConfig) -> None:
            super().__init__(config)
            torch.manual_seed(0)
            self.linear = torch.nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x).square().mean()

    def step(bf16: bool) -> list[torch.Tensor]:
        config = TransformerConfig(num_layers=1, hidden_size=6, num_attention_heads=1, bf16=bf16)
        model = Model(config).cuda()
        model = Float16Module(config, model) if bf16 else model
        ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, overlap_grad_reduce=True)
        model = DistributedDataParallel(config, ddp, model)
        options = OptimizerConfig(
            optimizer="adam",
            lr=0.1,
            weight_decay=0.0,
            clip_grad=0.0,
            bf16=bf16,
            use_distributed_optimizer=True,
        )
        optimizer = get_megatron_optimizer(options, [model])
        model.zero_grad_buffer()
        optimizer.zero_grad()
        model(x[rank].cuda()).backward()
        model.finish_grad_sync()
        success, _, _ = optimizer.step()
        assert success
        return [p.detach() for p in model.parameters()]

    torch.manual_seed(0)
    reference = torch.nn.Linear(6, 3)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=0.1, weight_decay=0.0)
    torch.stack([reference(batch).square().mean() for batch in x]).mean().backward()
    optimizer.step()
    for ours, theirs in zip(step(bf16=False), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(step(bf16=True), reference.parameters(), strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.float(), theirs.detach(), rtol=2e-2, atol=2e-2)


def model_parallel(tensor: int = 1, pipeline: int = 1) -> None:
    """Process groups of 2 ranks, and Megatron's random states."""
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.destroy_model_parallel()
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tensor, pipeline)
    tensor_parallel.model_parallel_cuda_manual_seed(1)


def gather(x: torch.Tensor) -> torch.Tensor:
    """x of both ranks: [2, *x.shape]"""
    parts = [torch.empty_like(x) for _ in range(2)]
    torch.distributed.all_gather(parts, x)
    return torch.stack(parts)


# --- the tests ----------------------------------------------------------------------------------------------

SINGLE = [
    "check_cuda_means_cpu",
    "check_torch_is_unchanged_otherwise",
    "check_type_names_for_megatron",
    "check_generator",
    "check_device_streams_memory",
    "check_fused_functions_are_not_compiled",
]
DISTRIBUTED = [
    "check_tensor_parallel_random_states",
    "check_recompute_with_dropout",
    "check_pipeline_messages",
    "check_distributed_optimizer",
]


@pytest.mark.parametrize("check", ["check_cuda_machine", "check_late_install"])
def test_install(check: str) -> None:
    output = run_checks([check])
    assert PASSED + check in output, output


@pytest.fixture(scope="module")
def outputs() -> dict[tuple[str, ...], str]:
    return {}


@pytest.mark.parametrize("check", SINGLE + DISTRIBUTED)
def test_megatron_on_cpu(check: str, outputs: dict[tuple[str, ...], str]) -> None:
    checks, processes = (SINGLE, 0) if check in SINGLE else (DISTRIBUTED, 2)
    if tuple(checks) not in outputs:  # one launch for all of them: importing Megatron is most of the time
        outputs[tuple(checks)] = run_checks(checks, processes)
    output = outputs[tuple(checks)]
    assert output.count(PASSED + check) == max(1, processes), output


def main(checks: list[str]) -> None:
    from archscale_megatron import cpu

    if checks[0] not in ("check_cuda_machine", "check_late_install"):
        assert cpu.install()
    for name in checks:
        check: Callable[[], None] = globals()[name]
        check()
        print(PASSED + name + "\n", end="", flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
