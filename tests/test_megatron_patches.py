"""megatron_patches.py: each patch is guarded against a change of Megatron, and its reason is shown to hold.

This file is also the script of the processes that are patched: `python test_megatron_patches.py <check> ...`.
"""

import ast
import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import inspect
import os
import re
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import psutil
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from archscale_megatron import cpu
from tests.launch import torchrun

if __name__ == "__main__":
    cpu.install()

PASSED = "passed: "

WRITER = "core/dist_checkpointing/strategies/filesystem_async.py"
# What each patch replaces or relies on, in 0.19.2: (file, name, first digits of the SHA-256 of its source).
GUARDED = {
    "_allow_no_cuda": [("training/initialize.py", "initialize_megatron", "1894d53ca729")],
    "_data_loader_with_own_generator": [
        ("training/datasets/data_samplers.py", "build_pretraining_data_loader", "de7cb12d9681"),
    ],
    "_sizes_of_an_all_to_all": [
        ("core/transformer/moe/moe_utils.py", "maybe_move_tensor_to_cpu", "47a1092f05ba"),
        (
            "core/transformer/moe/token_dispatcher.py",
            "MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize",
            "4655a7033d8d",
        ),
    ],
    "_skip_compiled_helpers": [("core/datasets/utils.py", "compile_helpers", "02c160f0fa9c")],
    "_adam_without_fused_libraries": [
        ("core/optimizer/__init__.py", "_get_megatron_optimizer_based_on_param_groups", "f4f1d380077e"),
        ("core/optimizer/distrib_optimizer.py", "DistributedOptimizer.state_dict", "8881ca2f5638"),
        ("core/optimizer/distrib_optimizer.py", "DistributedOptimizer.load_state_dict", "5c2af1e56e0b"),
    ],
    "_weight_gradients_without_apex": [
        ("core/tensor_parallel/layers.py", "LinearWithGradAccumulationAndAsyncCommunication", "6143fe8d2e29"),
        ("core/utils.py", "drain_embedding_wgrad_compute", "79dbae0b43f4"),
    ],
    "_norms_and_copies_in_one_kernel": [
        ("core/utils.py", "local_multi_tensor_l2_norm", "128bb632d776"),
        ("core/utils.py", "local_multi_tensor_scale", "c68dc586744c"),
        ("core/optimizer/clip_grads.py", "get_grad_norm_fp32", "c086cd323174"),
        ("core/optimizer/clip_grads.py", "clip_grad_by_total_norm_fp32", "19d15a603c4a"),
        ("core/optimizer/optimizer.py", "_multi_tensor_copy_this_to_that", "1c15b8061ac0"),
    ],
    "_fp32_parameters_first": [
        ("core/optimizer/distrib_optimizer.py", "DistributedOptimizer._build_optimizer_group_ranges", "41e95fbf717f"),
        (
            "core/optimizer/distrib_optimizer.py",
            "DistributedOptimizer._build_model_and_main_param_groups",
            "8cb3e3830d39",
        ),
    ],
    "_fp32_parameters_of_half_precision_optimizers": [
        ("core/optimizer/optimizer.py", "Float16OptimizerWithFloat16Params.sharded_state_dict", "20365b6e786a"),
        ("core/optimizer/optimizer.py", "Float16OptimizerWithFloat16Params.load_state_dict", "3cd130706bf1"),
    ],
    "_muon_by_parameter_class": [
        ("core/optimizer/__init__.py", "_get_megatron_emerging_optimizer", "03118773ae24"),
        ("core/optimizer/emerging_optimizers.py", "EmergingOptimizerEntry", "55be225264a3"),
        ("core/optimizer/emerging_optimizers.py", "TensorParallelMuon", "d1a190c1aab3"),
        ("core/optimizer/emerging_optimizers.py", "_muon_config_to_kwargs", "8a4eeda57fb3"),
        ("core/optimizer/layer_wise_optimizer.py", "tag_params_for_buffer_routing", "1df28f070a0f"),
    ],
    "_names_of_optimizers": [
        ("training/arguments.py", "add_megatron_arguments", "61c518361be3"),
        (
            "training/inprocess_restart.py",
            "maybe_wrap_for_inprocess_restart",
            "b634ce36e400",
        ),
    ],
    "_synchronous_save_without_manager": [
        ("core/dist_checkpointing/strategies/torch.py", "TorchDistSaveShardedStrategy.save", "0ab52a544c46"),
        (
            "core/dist_checkpointing/strategies/filesystem_async.py",
            "get_write_results_queue",
            "5528981e75e7",
        ),
    ],
    "_optimizer_state_without_gathering": [
        ("core/optimizer/distrib_optimizer.py", f"DistributedOptimizer.{name}", digest)
        for name, digest in {
            "sharded_param_state_fully_reshardable": "132366305b19",
            "load_parameter_state_from_fully_reshardable": "45254edb9ab5",
            "sharded_state_dict": "558178b415b2",
            "_get_main_param_and_optimizer_states": "0e8c885599cd",
            "_set_main_param_and_optimizer_states": "abb463384d3f",
            "_build_model_gbuf_range": "7ba5c9902b98",
        }.items()
    ],
    "_save_without_copies": [
        (
            "core/dist_checkpointing/strategies/filesystem_async.py",
            "FileSystemWriterAsync.prepare_write_data",
            "34f499f7c43c",
        ),
    ],
    "_asynchronous_save_of_a_snapshot": [
        ("core/dist_checkpointing/strategies/filesystem_async.py", f"FileSystemWriterAsync.{name}", digest)
        for name, digest in {"get_save_function_and_args": "d0f1da50cd40", "preload_tensors": "980b662270ce"}.items()
    ]
    + [
        ("core/dist_checkpointing/strategies/async_utils.py", name, digest)
        for name, digest in {
            "AsyncRequest": "4b6122059706",
            "AsyncCallsQueue.schedule_async_request": "9c1d67c13cdb",
            "PersistentAsyncCaller.schedule_async_call": "1aaed4357853",
            "PersistentAsyncCaller.async_loop": "499387891d5c",
        }.items()
    ],
    "_checkpoint_worker_outlives_sigterm": [
        ("core/dist_checkpointing/strategies/async_utils.py", "PersistentAsyncCaller", "c1ec3c1a8c74"),
        (WRITER, "get_write_results_queue", "5528981e75e7"),
    ],
    "_optimizer_groups": [("training/training.py", "get_megatron_optimizer_config", "414f2e721a13")],
    "_not_a_number_in_the_first_iteration": [
        ("core/rerun_state_machine.py", "RerunStateMachine.validate_result", "7ae75e388c41"),
    ],
    "_random_states_of_reruns": [
        ("core/tensor_parallel/random.py", "CudaRNGStatesTracker.set_states", "fce1685b837c"),
    ],
    "_layer_symbols": [("core/models/hybrid/hybrid_layer_allocation.py", "Symbols", "39922661ee42")],
    "_shared_state_between_stages": [
        ("core/pipeline_parallel/p2p_communication.py", "P2PCommunicator", "18d791a6d8eb"),
    ],
    "_tasks_beside_validation": [
        ("training/training.py", "evaluate_and_print_results", "2fc7a80beed5"),
        ("training/training.py", "evaluate", "ad7897318fc8"),
    ],
    "_throughput_of_hybrid_models": [
        ("training/training.py", "num_floating_point_operations", "0e870f7f502f"),
        ("training/training.py", "training_log", "7e7ebec01bcf"),
    ],
    "_checkpoints_with_digests": [(WRITER, "FileSystemWriterAsync.write_preloaded_data", "64433b7aec0e")],
    "_saves_end_on_all_ranks": [
        (WRITER, "FileSystemWriterAsync.write_preloaded_data_multithread", "33c60cd0dc75"),
        (WRITER, "FileSystemWriterAsync.get_save_function_and_args", "d0f1da50cd40"),
        (WRITER, "FileSystemWriterAsync.prepare_local_plan", "e21f2a714122"),
        (WRITER, "FileSystemWriterAsync.finish", "ee116e87ccdc"),
        (WRITER, "FileSystemWriterAsync.retrieve_write_results", "378b528cf91d"),
        (
            "core/dist_checkpointing/strategies/state_dict_saver.py",
            "save_state_dict_async_finalize",
            "db8d96a4bf33",
        ),
        (
            "core/dist_checkpointing/strategies/async_utils.py",
            "AsyncCallsQueue.maybe_finalize_async_calls",
            "58442e0c621e",
        ),
        ("core/dist_checkpointing/serialization.py", "save", "c6584b7a8391"),
        ("core/dist_checkpointing/core.py", "save_config", "4561d81eed4d"),
        ("training/checkpointing.py", "save_checkpoint", "42e813b3aa30"),
        ("training/async_utils.py", "maybe_finalize_async_save", "7878946b4f05"),
    ],
    "_load_newest_whole_checkpoint": [
        ("training/checkpointing.py", "read_metadata", "436e8b36f0bf"),
        ("training/checkpointing.py", "load_checkpoint", "ee0f61114e6f"),
        ("training/checkpointing.py", "_load_base_checkpoint", "5c7e88fc4f89"),
    ],
    "_no_code_in_checkpoints": [
        ("core/dist_checkpointing/serialization.py", "load_common_state_dict", "bd087edfa74c"),
        ("core/dist_checkpointing/strategies/torch.py", "MCoreLoadPlanner", "9da0ddd24fd5"),
    ],
}


def test_release() -> None:
    assert importlib.metadata.version("megatron-core") == "0.19.2", (
        "read every patch in archscale_megatron/megatron_patches.py again, then put the new release here"
    )


@pytest.mark.parametrize("patch, file, name, digest", [(p, *entry) for p in GUARDED for entry in GUARDED[p]])
def test_patched_source_is_what_was_read(patch: str, file: str, name: str, digest: str) -> None:
    spec = importlib.util.find_spec("megatron")
    assert spec is not None and spec.submodule_search_locations is not None
    text = Path(spec.submodule_search_locations[0], file).read_text()
    node: ast.AST = ast.parse(text)
    for part in name.split("."):
        node = next((n for n in node.body if getattr(n, "name", None) == part), None)  # type: ignore[attr-defined]
        assert node is not None, f"megatron/{file} has no {name}: megatron_patches.{patch} patches it"
    source = ast.get_source_segment(text, node)
    assert source is not None and hashlib.sha256(source.encode()).hexdigest().startswith(digest), (
        f"megatron/{file}: {name} is not what megatron_patches.{patch} was written for: read both again"
    )


@pytest.mark.parametrize("gpu", [False, True])
def test_every_patch_is_guarded_explained_and_applied_once(gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from archscale_megatron import megatron_patches

    applied: list[str] = []
    expected = []
    for name in re.findall(r"^ +(_\w+)\(\)$", inspect.getsource(megatron_patches.apply), re.MULTILINE):
        assert name in GUARDED
        reason = " ".join(getattr(megatron_patches, name).__doc__.split())
        assert re.search(r"\.py:\d+", reason), f"{name} does not say which line it patches"
        assert ("CPU only." in reason) != ("On a GPU as well." in reason), f"{name}: on a GPU, or not?"
        if not gpu or "On a GPU as well." in reason:
            expected.append(name)
        monkeypatch.setattr(megatron_patches, name, functools.partial(applied.append, name))
    monkeypatch.setattr(megatron_patches, "_applied", False)
    monkeypatch.setattr(cpu, "ACTIVE", not gpu)
    megatron_patches.apply()
    megatron_patches.apply()
    assert applied == expected


# --- in a patched process: without the patch the fault is there, with it it is gone --------------------------


def check_allow_no_cuda() -> None:
    from megatron.training import initialize_megatron

    from archscale_megatron import megatron_patches

    with pytest.raises(AssertionError, match="Megatron requires CUDA"):
        initialize_megatron()
    megatron_patches._allow_no_cuda()
    with pytest.raises(AssertionError, match="args is not initialized"):  # the next thing that it looks at
        initialize_megatron()


def check_data_loader_with_own_generator() -> None:
    from megatron.training import global_vars, training

    from archscale_megatron import megatron_patches

    global_vars.set_args(Namespace(dataloader_type="external", seed=1))

    def draws() -> bool:
        loader = torch.utils.data.DataLoader(range(4), num_workers=0)
        loader = training.build_pretraining_data_loader(loader, 0)
        before = torch.get_rng_state()
        assert len(list(iter(loader))) == 4
        return not torch.equal(torch.get_rng_state(), before)

    assert draws()
    megatron_patches._data_loader_with_own_generator()
    assert not draws()
    assert training.build_pretraining_data_loader(None, 0) is None


def check_weight_gradients_without_apex() -> None:
    """Megatron refuses the fusion; with the patch, `main_grad` is the sum of the micro-batches' gradients."""
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.core.transformer import TransformerConfig

    from archscale_megatron import megatron_patches

    initialize_distributed()
    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=1, gradient_accumulation_fusion=True
    )  # fmt: skip

    def linear() -> ColumnParallelLinear:
        return ColumnParallelLinear(8, 6, config=config, init_method=torch.nn.init.normal_, bias=False)

    with pytest.raises(RuntimeError, match="fused_weight_gradient_mlp_cuda"):
        linear()
    megatron_patches._weight_gradients_without_apex()
    layer = linear()
    weight = layer.weight
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(6, 8), False
    inputs, grads = torch.randn(2, 5, 3, 8), torch.randn(2, 5, 3, 6)
    for x, grad in zip(inputs, grads, strict=True):
        layer(x)[0].backward(grad)
    assert weight.grad_added_to_main_grad
    expected = torch.einsum("msbo,msbi->oi", grads.double(), inputs.double())
    assert (weight.main_grad - expected).abs().max() < 1e-5


def check_norms_and_copies_in_one_kernel() -> None:
    """Megatron waits for values of norms; with the patch for none, and the numbers are the same."""
    from megatron.core.optimizer import clip_grads, optimizer

    from archscale_megatron import megatron_patches

    def run() -> tuple[int, list[torch.Tensor]]:
        generator = torch.Generator().manual_seed(2)
        tensors = [torch.randn(n, generator=generator) for n in (3, 1, 500)]
        with count_values_asked_for() as asked:
            norm, _ = clip_grads.multi_tensor_applier(clip_grads.l2_norm_impl, torch.zeros(1), [tensors], False)
        copies = [torch.empty(t.shape, dtype=torch.bfloat16) for t in tensors]
        optimizer._multi_tensor_copy_this_to_that(tensors, copies, torch.zeros(1))
        doubled = [torch.empty_like(t) for t in tensors]
        scale = clip_grads.multi_tensor_scale_impl
        clip_grads.multi_tensor_applier(scale, torch.zeros(1), [tensors, doubled], 2.0)
        clip_grads.multi_tensor_applier(scale, torch.zeros(1), [tensors, tensors], 0.5)
        return asked[0], [norm, *tensors, *copies, *doubled]

    asked, expected = run()
    assert asked
    megatron_patches._norms_and_copies_in_one_kernel()
    asked, found = run()
    assert asked == 0
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@contextlib.contextmanager
def count_values_asked_for() -> Iterator[list[int]]:
    """How often a tensor's value came to Python, which waits for a GPU."""
    count = [0]

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            count[0] += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **kwargs or {})

    with Mode():
        yield count


def check_optimizer_state_without_gathering() -> None:
    """Behind the padding of a bucket, the state saved is that of others."""
    from megatron.core import dist_checkpointing
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer import TransformerConfig

    from archscale_megatron import megatron_patches

    initialize_distributed()
    model = torch.nn.ParameterDict({name: torch.nn.Parameter(torch.randn(10, 10)) for name in "abc"})
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, overlap_grad_reduce=True, bucket_size=1)
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    model = DistributedDataParallel(config, ddp, model)
    optimizer_config = OptimizerConfig(optimizer="adam", lr=1e-3, use_distributed_optimizer=True)
    (optimizer,) = get_megatron_optimizer(optimizer_config, [model]).chained_optimizers
    optimizer._init_optimizer_states_with_dummy_values()
    states = {}
    for name, parameter in model.module.named_parameters():
        states[name] = optimizer._get_main_param_and_optimizer_states(parameter)["exp_avg"].normal_()

    def sharded(is_loading: bool) -> dict[str, torch.Tensor]:
        names = dict(model.module.named_parameters())
        of_model = {
            n: dist_checkpointing.ShardedTensor.from_rank_offsets(n, p, replica_id=(0, 0, 0)) for n, p in names.items()
        }
        metadata = {"distrib_optim_fully_reshardable_mem_efficient": False}
        found = optimizer.sharded_param_state_fully_reshardable(of_model, is_loading, metadata).values()
        return {state["exp_avg"].key: state["exp_avg"].data for state in found}

    def agree() -> list[bool]:
        found = sharded(is_loading=False)
        return [torch.equal(found[f"optimizer.state.exp_avg.{n}"].view(-1), state) for n, state in states.items()]

    assert len(optimizer.buffers[0].buckets) == 3
    assert sorted(agree()) == [False, False, True]
    megatron_patches._optimizer_state_without_gathering()
    assert agree() == [True, True, True]
    for is_loading in (False, True):  # nothing is copied
        own = {tensor.data_ptr() for tensor in sharded(is_loading).values()}
        assert own == {state.data_ptr() for state in states.values()}


def check_asynchronous_save_of_a_snapshot() -> None:
    """Training goes on while the worker writes: what is written is what there was."""
    import multiprocessing

    from megatron.core.dist_checkpointing.strategies import async_utils, filesystem_async

    from archscale_megatron import megatron_patches
    from archscale_megatron.checkpoint import snapshot

    trained = multiprocessing.get_context("fork").Event()
    write = filesystem_async._write_item

    @functools.wraps(write)
    def write_later(*args: object, **kwargs: object) -> object:
        assert trained.wait(60)
        return write(*args, **kwargs)

    filesystem_async._write_item = write_later
    filesystem_async.get_write_results_queue("fork")  # as Megatron's checkpoint worker has; spawning takes 2 s
    async_utils.AsyncCallsQueue.warmup_persistent_caller(0, "fork", io_priority=None)
    calls = async_utils.AsyncCallsQueue(persistent=True)

    def saved() -> float:
        weight = torch.full((64,), 1.0)
        trained.clear()
        with tempfile.TemporaryDirectory() as folder:
            calls.schedule_async_request(save_weight(weight, folder, asynchronous=True))
            weight.fill_(2.0)
            trained.set()
            calls.maybe_finalize_async_calls(blocking=True)
            return load_weight(folder)[0].item()

    try:
        assert saved() == 2.0
        megatron_patches._asynchronous_save_of_a_snapshot()
        assert [saved(), saved()] == [1.0, 1.0]
        assert len(snapshot._free) == 1  # both had the same memory
    finally:
        calls.close(abort=True)
        filesystem_async._write_item = write


def check_checkpoint_worker_outlives_sigterm() -> None:
    """SIGTERM to all processes of a rank ends the writer and the queue of its results; with the patch, neither, and a
    writer that is killed is an error in the place of a wait. Both go with the rank."""
    from megatron.core.dist_checkpointing.strategies import async_utils, filesystem_async

    from archscale_megatron import megatron_patches

    get_queue = filesystem_async.get_write_results_queue

    def start() -> tuple[async_utils.AsyncCallsQueue, list[psutil.Process]]:
        manager = filesystem_async.get_write_results_queue("fork")._manager._process
        async_utils.AsyncCallsQueue.warmup_persistent_caller(0, "fork", io_priority=None)
        writer = async_utils.PersistentAsyncCaller._persistent_process
        return async_utils.AsyncCallsQueue(persistent=True), [psutil.Process(p.pid) for p in (manager, writer)]

    def left_after_sigterm(processes: list[psutil.Process]) -> int:
        for process in processes:
            process.terminate()
        return len(psutil.wait_procs(processes, timeout=5)[1])

    filesystem_async._results_queue = async_utils.PersistentAsyncCaller._persistent_process = None
    _, processes = start()
    assert left_after_sigterm(processes) == 0
    async_utils.PersistentAsyncCaller._persistent_process = None
    megatron_patches._checkpoint_worker_outlives_sigterm()
    calls, processes = start()
    with tempfile.TemporaryDirectory() as folder:
        calls.schedule_async_request(save_weight(torch.ones(64), folder, asynchronous=True))
        assert left_after_sigterm(processes) == 2
        calls.maybe_finalize_async_calls(blocking=True)
        assert torch.equal(load_weight(folder), torch.ones(64))
    with tempfile.TemporaryDirectory() as folder:
        async_utils.PersistentAsyncCaller._persistent_process.kill()
        async_utils.PersistentAsyncCaller._persistent_process.join()
        request = save_weight(torch.ones(64), folder, asynchronous=True)
        with pytest.raises(RuntimeError, match="the process that writes checkpoints ended with exit code -9"):
            calls.schedule_async_request(request)
    calls.close(abort=True)
    filesystem_async.get_write_results_queue = get_queue
    filesystem_async._results_queue = None


def check_save_without_copies() -> None:
    from archscale_megatron import megatron_patches

    weight = torch.arange(64.0)[8:16]
    with tempfile.TemporaryDirectory() as folder:

        def copied() -> bool:
            (bucket,) = save_weight(weight, folder, asynchronous=True).async_fn_args[1]
            (pointer,) = (tensor.data_ptr() for item, tensor in bucket[2][1])
            return pointer != weight.data_ptr()

        assert copied()
        megatron_patches._save_without_copies()
        assert not copied()
        save_weight(weight, folder)
        assert torch.equal(load_weight(folder), torch.arange(8.0, 16.0))


def check_synchronous_save_without_manager() -> None:
    from multiprocessing.context import BaseContext

    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from archscale_megatron import megatron_patches

    def no_manager(context: BaseContext) -> None:
        raise ChildProcessError("a manager")

    BaseContext.Manager = no_manager  # type: ignore[assignment, method-assign]
    filesystem_async._results_queue = None
    get_queue = filesystem_async.get_write_results_queue
    with tempfile.TemporaryDirectory() as folder, pytest.raises(ChildProcessError):
        save_weight(torch.arange(8.0), folder)
    megatron_patches._synchronous_save_without_manager()
    with tempfile.TemporaryDirectory() as folder:
        save_weight(torch.arange(8.0), folder)
        assert torch.equal(load_weight(folder), torch.arange(8.0))
    assert filesystem_async.get_write_results_queue is get_queue
    with tempfile.TemporaryDirectory() as folder, pytest.raises(ChildProcessError):
        save_weight(torch.arange(8.0), folder, asynchronous=True)  # keeps its manager


def check_sizes_of_an_all_to_all() -> None:
    from megatron.core.transformer.moe import token_dispatcher

    from archscale_megatron import megatron_patches

    initialize_distributed()
    group = torch.distributed.group.WORLD

    def exchange() -> torch.Tensor:
        sizes = token_dispatcher.maybe_move_tensor_to_cpu(torch.tensor([3]), as_numpy=True)
        return token_dispatcher.all_to_all(group, torch.arange(3.0), sizes, sizes)

    group_of_two = mock.patch.object(type(group), "size", lambda self: 2)  # of one, nothing is sent
    with group_of_two, pytest.raises(TypeError, match="incompatible function arguments"):
        exchange()
    megatron_patches._sizes_of_an_all_to_all()
    with group_of_two:
        assert torch.equal(exchange(), torch.arange(3.0))
    assert isinstance(token_dispatcher.maybe_move_tensor_to_cpu(torch.tensor([3])), torch.Tensor)


def check_skip_compiled_helpers() -> None:
    from megatron.core.datasets import utils

    from archscale_megatron import megatron_patches

    commands: list[list[str]] = []
    run, subprocess.run = subprocess.run, lambda command: commands.append(command) or Namespace(returncode=0)
    utils.compile_helpers()
    assert commands[0][0] == "make" and not Path(commands[0][2], "Makefile").exists()
    megatron_patches._skip_compiled_helpers()
    utils.compile_helpers()
    assert len(commands) == 1
    sys.modules["megatron.core.datasets.helpers_cpp"] = None  # type: ignore[assignment]  # not importable
    utils.compile_helpers()
    assert len(commands) == 2
    del sys.modules["megatron.core.datasets.helpers_cpp"]
    subprocess.run = run


def check_adam_without_fused_libraries() -> None:
    """A distributed optimizer loads the sharded state that it saved."""
    from megatron.core import dist_checkpointing, optimizer
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import MegatronModule

    from archscale_megatron import megatron_patches
    from archscale_megatron.fused_adam import FusedAdam

    initialize_distributed()
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    metadata = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}

    class Model(MegatronModule):
        def __init__(self) -> None:
            super().__init__(config)
            self.weight = torch.nn.Parameter(torch.arange(32.0).view(4, 8))

    def build() -> tuple:
        ddp = DistributedDataParallelConfig(use_distributed_optimizer=True)
        model = DistributedDataParallel(config, ddp, Model())
        options = optimizer.OptimizerConfig(optimizer="adam", lr=0.1, use_distributed_optimizer=True)
        return model, optimizer.get_megatron_optimizer(options, [model])

    def state(model: torch.nn.Module, optim: object, is_loading: bool) -> dict:
        sharded = {"model": model.module.sharded_state_dict(metadata=metadata)}
        sharded["optimizer"] = optim.sharded_state_dict(sharded, is_loading=is_loading, metadata=metadata)
        return sharded

    def save_and_load() -> None:
        model, optim = build()
        for _ in range(3):
            optim.zero_grad()
            (model.module.weight**2).sum().backward()
            model.finish_grad_sync()
            optim.step()
        with tempfile.TemporaryDirectory() as folder:
            dist_checkpointing.save(state(model, optim, False), folder)
            other, loaded = build()
            with torch.no_grad():
                loaded.load_state_dict(dist_checkpointing.load(state(other, loaded, True), folder)["optimizer"])
        (ours,), (theirs,) = (o.chained_optimizers for o in (optim, loaded))
        assert isinstance(ours.optimizer, FusedAdam)
        assert [group["step"] for group in theirs.optimizer.param_groups] == [3]
        for a, b in zip(ours.optimizer.state.values(), theirs.optimizer.state.values(), strict=True):
            assert torch.equal(a["exp_avg"], b["exp_avg"]) and a["exp_avg"].abs().sum() > 0
            assert torch.equal(a["exp_avg_sq"], b["exp_avg_sq"])

    assert optimizer.USING_PYTORCH_OPTIMIZER, "Transformer Engine or Apex is installed: nothing to patch"
    with pytest.raises((AssertionError, KeyError)):
        save_and_load()
    megatron_patches._adam_without_fused_libraries()
    save_and_load()


def check_fp32_parameters_first() -> None:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    from archscale_megatron import megatron_patches

    fp32, bf16 = (torch.nn.Parameter(torch.zeros(1, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16))
    ranges = [{p.dtype: [{"param_map": {p: None}}] for p in (bf16, fp32)}]

    def places() -> list[tuple[int, int]]:
        index, _ = DistributedOptimizer._build_optimizer_group_ranges([{"params": [bf16, fp32]}], ranges)
        return [index[fp32], index[bf16]]

    assert places() == [(0, 1), (0, 0)]
    megatron_patches._fp32_parameters_first()
    assert places() == [(0, 0), (0, 1)]


def check_fp32_parameters_of_half_precision_optimizers() -> None:
    """Of two bf16 parameters with an fp32 one between them, each has its own state in a checkpoint."""
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

    from archscale_megatron import megatron_patches
    from archscale_megatron.fused_adam import FusedAdam

    dtypes = {"first": torch.bfloat16, "between": torch.float32, "last": torch.bfloat16}
    model = {name: torch.nn.Parameter(torch.ones(2, dtype=dtype)) for name, dtype in dtypes.items()}
    optimizer = Float16OptimizerWithFloat16Params(
        FusedAdam([{"params": list(model.values())}]), OptimizerConfig(lr=0.1, bf16=True, clip_grad=0.0), None, None
    )
    for gradient, parameter in enumerate(model.values(), start=1):
        parameter.main_grad = torch.full((2,), float(gradient))
    optimizer.step()

    def averages() -> dict[str, float]:
        sharded = {name: ShardedTensor.from_rank_offsets(name, p) for name, p in model.items()}
        state = optimizer.sharded_state_dict(sharded)["optimizer"]["state"].values()
        return {s["exp_avg"].key.split(".")[-1]: round(s["exp_avg"].data[0].item(), 4) for s in state}

    with pytest.raises(ValueError, match="does not match any model sharded param"):
        averages()
    megatron_patches._fp32_parameters_of_half_precision_optimizers()
    assert averages() == {"first": 0.1, "between": 0.2, "last": 0.3}
    sharded = {name: ShardedTensor.from_rank_offsets(name, p) for name, p in model.items()}
    loaded = optimizer.sharded_state_dict(sharded)["fp32_from_fp16_params"]
    state = optimizer.state_dict() | {"fp32_from_fp16_params": [[t.data + 1 for t in group] for group in loaded]}
    before = [p.clone() for group in optimizer.optimizer.param_groups for p in group["params"]]
    with torch.no_grad():
        optimizer.load_state_dict(state)
    after = [p for group in optimizer.optimizer.param_groups for p in group["params"]]
    assert all(torch.equal(a, b + 1) for a, b in zip(after, before, strict=True))


def check_not_a_number_in_the_first_iteration() -> None:
    from megatron.core.rerun_state_machine import RerunMode, RerunStateMachine

    from archscale_megatron import megatron_patches

    def first_iteration(fatal: bool = True) -> RerunStateMachine:
        machine = RerunStateMachine(mode=RerunMode.VALIDATE_RESULTS)
        assert machine.should_run_forward_backward(None)
        machine.validate_result(torch.tensor(1.0), torch.isnan, "NaN", fatal=fatal)
        machine.validate_result(torch.tensor(torch.nan), torch.isnan, "NaN", fatal=fatal)
        return machine

    initialize_distributed()
    assert not first_iteration().rerun_requested
    megatron_patches._not_a_number_in_the_first_iteration()
    with pytest.raises(RuntimeError, match="NaN: nan, in iteration 0, the first of this launch"):
        first_iteration()
    machine = first_iteration(fatal=False)
    assert not machine.should_run_forward_backward(None)
    assert machine.should_checkpoint_and_exit() == (False, False, 0)
    assert machine.should_run_forward_backward(None)
    machine.validate_result(torch.tensor(torch.nan), torch.isnan, "NaN")
    assert machine.rerun_requested  # from the second on, Megatron's own


def check_random_states_of_reruns() -> None:
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    from archscale_megatron import megatron_patches

    tracker = CudaRNGStatesTracker()
    tracker.add("model-parallel-rng", 1)

    def draw() -> float:
        with tracker.fork():
            return torch.rand(()).item()

    def same_after_two_restores() -> bool:
        states = tracker.get_states()
        draws = [draw()]
        for _ in range(2):
            tracker.set_states(states)
            draws.append(draw())
        assert draws[0] == draws[1]
        return draws[1] == draws[2]

    assert not same_after_two_restores()
    megatron_patches._random_states_of_reruns()
    assert same_after_two_restores()


def check_muon_by_parameter_class() -> None:
    """A_log is not Muon's, and in the layer-wise optimizer not among the parameters that stay whole."""
    from megatron.core.optimizer.emerging_optimizers import _EMERGING_OPTIMIZERS
    from megatron.training import global_vars, training

    from archscale_megatron import megatron_patches

    global_vars.set_args(Namespace(optimizer="muon"))
    names = ("mixer.in_proj.weight", "mixer.A_log")
    parameters = {name: torch.nn.Parameter(torch.ones(2, 2)) for name in names}
    chunk = Namespace(named_parameters=parameters.items, parameters=parameters.values)

    def is_muons(name: str) -> tuple[bool, bool]:
        training.tag_params_for_buffer_routing([chunk])
        keys = _EMERGING_OPTIMIZERS["muon"].default_param_overrides
        p = parameters[name]
        return not any(key.matches(p, name) for key in keys), p.is_managed_by_layer_wise_optimizer

    assert [is_muons(name) for name in names] == [(True, True), (True, True)]
    assert "muonh" not in _EMERGING_OPTIMIZERS
    megatron_patches._muon_by_parameter_class()
    assert [is_muons(name) for name in names] == [(True, True), (False, False)]
    assert "muonh" in _EMERGING_OPTIMIZERS


def check_names_of_optimizers() -> None:
    from megatron.training import arguments

    from archscale_megatron import megatron_patches

    sys.argv = ["pretrain_archscale.py", "--optimizer", "muonh"]
    with pytest.raises(SystemExit):
        arguments.parse_args(ignore_unknown_args=True)
    megatron_patches._names_of_optimizers()
    assert arguments.parse_args(ignore_unknown_args=True).optimizer == "muonh"


def check_checkpoints_with_digests() -> None:
    from archscale_megatron import megatron_patches
    from archscale_megatron.checkpoint import manifest

    with tempfile.TemporaryDirectory() as folder:
        save_weight(torch.arange(8.0), folder)
        assert not manifest.own_digests(Path(folder), 0)
    megatron_patches._checkpoints_with_digests()
    with tempfile.TemporaryDirectory() as folder:
        save_weight(torch.arange(8.0), folder)
        path = Path(folder, "__0_0.distcp")
        assert manifest.own_digests(path.parent, 0)[path.name]["digest"] == manifest.digest(path)


def check_load_newest_whole_checkpoint() -> None:
    """A tracker that cannot be read ends Megatron with exit code 0; `--ckpt-step` goes without it."""
    from megatron.training import checkpointing, global_vars

    from archscale_megatron import megatron_patches

    global_vars.set_args(Namespace(ckpt_step=4))
    with tempfile.TemporaryDirectory() as folder:
        tracker = Path(folder, "latest_checkpointed_iteration.txt")
        tracker.write_text("")
        with pytest.raises(SystemExit) as stop:
            checkpointing.read_metadata(str(tracker))
        assert not stop.value.code
        megatron_patches._load_newest_whole_checkpoint()
        assert checkpointing.read_metadata(str(tracker)) == (4, False)
        global_vars.get_args().ckpt_step = None
        tracker.write_text("release")
        assert checkpointing.read_metadata(str(tracker)) == (0, True)


def check_saves_end_on_all_ranks() -> None:
    """An error of the small file that rank 0 writes last ends training; the files of an older attempt stay."""
    from megatron.core.dist_checkpointing import core
    from megatron.training import checkpointing

    from archscale_megatron import megatron_patches
    from archscale_megatron.checkpoint import saving

    initialize_distributed()

    def save(folder: str) -> None:
        checkpointing.dist_checkpointing.save(sharded_weight(torch.arange(8.0)), folder, async_strategy="mcore")

    failing = mock.patch.object(core, "maybe_msc", mock.Mock(wraps=core.maybe_msc, open=mock.Mock(side_effect=OSError)))
    with tempfile.TemporaryDirectory() as folder, failing, pytest.raises(OSError):
        save(folder)
    megatron_patches._saves_end_on_all_ranks()
    args = Namespace(save="", load="", keep_last=None, save_retain_interval=None, finetune=False)
    for context, failed in ((failing, True), (mock.patch("os.getpid", os.getpid), False)):
        with (
            tempfile.TemporaryDirectory() as folder,
            context,
            mock.patch.object(saving.run_description, "describe", return_value={}),
        ):
            args.save = folder
            Path(folder, "architecture.json").touch()
            Path(folder, "iter_0000002").mkdir()
            Path(folder, "iter_0000002", "__7_0.distcp").touch()
            saving.save(args, 2, None, lambda folder=folder: save(f"{folder}/iter_0000002"))
            assert saving._last_failed is failed
            assert Path(folder, "iter_0000002", "manifest.json").exists() is not failed
            assert not Path(folder, "iter_0000002", "__7_0.distcp").exists()


def check_no_code_in_checkpoints() -> None:
    """A checkpoint whose objects or whose names run code when they are read: with the patch they do not."""
    from megatron.core import dist_checkpointing
    from torch.distributed.checkpoint import CheckpointException

    from archscale_megatron import megatron_patches
    from archscale_megatron.checkpoint import CheckpointError
    from tests.checkpoint.evil import write_evil

    initialize_distributed()
    with tempfile.TemporaryDirectory() as folder:
        ran = Path(folder, "ran")
        places = [write_evil(Path(folder, place), place, ran) for place in (".metadata", "common_state")]
        for place in places:
            with contextlib.suppress(Exception, CheckpointException):
                dist_checkpointing.load_common_state_dict(str(place))
            assert ran.exists()
            ran.rmdir()
        megatron_patches._no_code_in_checkpoints()
        for place in places:
            with pytest.raises(CheckpointError, match="posix.mkdir, which may run code"):
                dist_checkpointing.load_common_state_dict(str(place))
            assert not ran.exists()


def sharded_weight(weight: torch.Tensor) -> dict[str, object]:
    from megatron.core.dist_checkpointing import ShardedTensor

    return {"weight": ShardedTensor.from_rank_offsets("weight", weight)}


def initialize_distributed() -> None:
    from megatron.core import parallel_state, tensor_parallel

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(store=torch.distributed.HashStore(), rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(1)


def save_weight(weight: torch.Tensor, folder: str, asynchronous: bool = False) -> object:
    from megatron.core import dist_checkpointing

    initialize_distributed()
    return dist_checkpointing.save(
        sharded_weight(weight), folder, async_sharded_save=asynchronous, async_strategy="mcore"
    )


def load_weight(folder: str) -> torch.Tensor:
    from megatron.core import dist_checkpointing

    return dist_checkpointing.load_plain_tensors(folder)["weight"]


CHECKS = [name for name in list(globals()) if name.startswith("check_")]


@pytest.fixture(scope="module")
def output() -> str:
    """One process for all checks: importing Megatron is most of their time."""
    return torchrun(1, "-m", "tests.test_megatron_patches", *CHECKS, check=False).stdout


@pytest.mark.parametrize("check", CHECKS)
def test_patch(check: str, output: str) -> None:
    assert PASSED + check in output, output


def main(arguments: list[str]) -> None:
    for name in arguments:
        globals()[name]()
        print(PASSED + name, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
