"""megatron_patches.py: each patch is guarded against a change of Megatron, and its reason is shown to hold.

This file is also the script of the processes that are patched: `python test_megatron_patches.py <check> ...`.
"""

import ast
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
from pathlib import Path
from unittest import mock

import pytest
import torch

from archscale_megatron import cpu

if __name__ == "__main__":
    cpu.install()

ROOT = Path(__file__).parents[1]
PASSED = "passed: "

# What each patch replaces or relies on, in 0.19.2: (file, name, first digits of the SHA-256 of its source).
GUARDED = {
    "_allow_no_cuda": [("training/initialize.py", "initialize_megatron", "1894d53ca729")],
    "_data_loader_with_own_generator": [
        ("training/datasets/data_samplers.py", "build_pretraining_data_loader", "de7cb12d9681"),
    ],
    "_save_copies_of_tensors": [
        (
            "core/dist_checkpointing/strategies/filesystem_async.py",
            "FileSystemWriterAsync.prepare_write_data",
            "34f499f7c43c",
        ),
        (
            "core/dist_checkpointing/strategies/filesystem_async.py",
            "FileSystemWriterAsync.preload_tensors",
            "980b662270ce",
        ),
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
    "_optimizer_groups": [("training/training.py", "get_megatron_optimizer_config", "414f2e721a13")],
    "_layer_symbols": [("core/models/hybrid/hybrid_layer_allocation.py", "Symbols", "39922661ee42")],
    "_shared_state_between_stages": [
        ("core/pipeline_parallel/p2p_communication.py", "P2PCommunicator", "18d791a6d8eb"),
    ],
    "_throughput_of_hybrid_models": [
        ("training/training.py", "num_floating_point_operations", "0e870f7f502f"),
        ("training/training.py", "training_log", "7e7ebec01bcf"),
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


def check_save_copies_of_tensors() -> None:
    """Training goes on while an asynchronous save writes: what is written is what there was."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from archscale_megatron import megatron_patches

    filesystem_async.get_write_results_queue("fork")  # as Megatron's checkpoint worker does; spawning takes 2 s

    def saved() -> float:
        weight = torch.full((64,), 1.0)
        with tempfile.TemporaryDirectory() as folder:
            request = save_weight(weight, folder, asynchronous=True)
            weight.fill_(2.0)
            request.execute_sync()
            return load_weight(folder)[0].item()

    assert saved() == 2.0
    megatron_patches._save_copies_of_tensors()
    assert saved() == 1.0


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


def initialize_distributed() -> None:
    from megatron.core import parallel_state, tensor_parallel

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(store=torch.distributed.HashStore(), rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(1)


def save_weight(weight: torch.Tensor, folder: str, asynchronous: bool = False) -> object:
    from megatron.core import dist_checkpointing

    initialize_distributed()
    sharded = {"weight": dist_checkpointing.ShardedTensor.from_rank_offsets("weight", weight)}
    return dist_checkpointing.save(sharded, folder, async_sharded_save=asynchronous, async_strategy="mcore")


def load_weight(folder: str) -> torch.Tensor:
    from megatron.core import dist_checkpointing

    return dist_checkpointing.load_plain_tensors(folder)["weight"]


CHECKS = [name for name in list(globals()) if name.startswith("check_")]


@pytest.fixture(scope="module")
def output() -> str:
    """One process for all checks: importing Megatron is most of their time."""
    return launch(CHECKS)


@pytest.mark.parametrize("check", CHECKS)
def test_patch(check: str, output: str) -> None:
    assert PASSED + check in output, output


def launch(arguments: list[str]) -> str:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    result = subprocess.run(
        [sys.executable, *torchrun, __file__, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return result.stdout + result.stderr


def main(arguments: list[str]) -> None:
    for name in arguments:
        globals()[name]()
        print(PASSED + name, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
