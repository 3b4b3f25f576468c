"""Every patch of Megatron, in one place. Read against megatron-core 0.19.2.

An entry script calls `apply()` after `cpu.install()` and before it builds anything.
`tests/test_megatron_patches.py` holds a hash of each patched function: a new release of Megatron fails there,
and names the patch to read again.
"""

import argparse
import queue
from pathlib import Path
from typing import Any

from archscale_megatron import cpu

_applied = False


def apply() -> None:
    """Patch Megatron in this process; a second call does nothing."""
    global _applied
    if _applied:
        return
    if cpu.ACTIVE:
        _allow_no_cuda()
        _data_loader_with_own_generator()
        _save_copies_of_tensors()
        _sizes_of_an_all_to_all()
    _skip_compiled_helpers()
    _adam_without_fused_libraries()
    _fp32_parameters_first()
    _fp32_parameters_of_half_precision_optimizers()
    _muon_by_parameter_class()
    _names_of_optimizers()
    _synchronous_save_without_manager()
    _optimizer_groups()
    _layer_symbols()
    _shared_state_between_stages()
    _throughput_of_hybrid_models()
    _applied = True


def _allow_no_cuda() -> None:
    """`initialize_megatron` refuses a machine without CUDA, and `pretrain` gives no way to allow it.

    training/initialize.py:66 (the assertion). CPU only. The default of the argument is changed in the
    function, not the function in its module, because several modules hold it by name.
    """
    from megatron.training.initialize import initialize_megatron

    defaults = initialize_megatron.__defaults__
    assert defaults is not None and defaults[0] is False, "allow_no_cuda=False is no longer the first argument"
    initialize_megatron.__defaults__ = (True, *defaults[1:])


def _data_loader_with_own_generator() -> None:
    """The iterator of a data loader draws a seed from the CPU's generator, which is that of dropout here.

    A resumed run makes its iterators after it has restored the random state, so that its dropout would not be
    that of the run that was not stopped. training/datasets/data_samplers.py:19, used at
    training/training.py:4569. CPU only.
    """
    import torch
    from megatron.training import get_args, training

    build = training.build_pretraining_data_loader

    def build_pretraining_data_loader(dataset: Any, consumed_samples: int) -> Any:
        loader = build(dataset, consumed_samples)
        if isinstance(loader, torch.utils.data.DataLoader):
            loader.generator = torch.Generator().manual_seed(get_args().seed)
        return loader

    training.build_pretraining_data_loader = build_pretraining_data_loader


def _save_copies_of_tensors() -> None:
    """An asynchronous save shares tensors on the CPU with the process that writes them, while training
    changes them: the checkpoint mixes iterations.

    core/dist_checkpointing/strategies/filesystem_async.py:114 (`prepare_write_data`, which copies only the
    views among the CPU tensors). CPU only.
    """
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    prepare = FileSystemWriterAsync.prepare_write_data

    def prepare_write_data(self: FileSystemWriterAsync, plan: Any, planner: Any) -> None:
        prepare(self, plan, planner)
        self.write_buckets = [
            (path, name, (data, [(item, tensor.clone()) for item, tensor in tensors]))
            for path, name, (data, tensors) in self.write_buckets
        ]

    FileSystemWriterAsync.prepare_write_data = prepare_write_data


def _sizes_of_an_all_to_all() -> None:
    """How many tokens go to each expert-parallel rank becomes an array only where it is moved from a GPU; a tensor is
    not what an all-to-all takes.

    core/transformer/moe/moe_utils.py:1169 (`maybe_move_tensor_to_cpu`, used in token_dispatcher.py:927). CPU only.
    """
    from megatron.core.transformer.moe import token_dispatcher

    original = token_dispatcher.maybe_move_tensor_to_cpu

    def maybe_move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        moved = original(tensor, as_numpy, record_stream)
        return moved.numpy() if as_numpy and hasattr(moved, "numpy") else moved

    token_dispatcher.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu


def _skip_compiled_helpers() -> None:
    """Rank 0 runs `make` for the dataset helpers. The wheel has them compiled, and no Makefile: exit 1.

    core/datasets/utils.py:20, called at training/initialize.py:178. On a GPU as well.
    """
    from megatron.core.datasets import utils

    make = utils.compile_helpers

    def compile_helpers() -> None:
        try:
            import megatron.core.datasets.helpers_cpp  # noqa: F401
        except ImportError:
            make()

    utils.compile_helpers = compile_helpers


def _adam_without_fused_libraries() -> None:
    """Without Transformer Engine and Apex, Megatron takes torch's AdamW and cannot load what it saved.

    core/optimizer/distrib_optimizer.py:839 (`assert len(steps) == 1` on a state that is still empty), :1026
    (one `step` tensor for all parameters), :1223 (KeyError 'step'). `FusedAdam` takes Apex's place, whose
    state layout it has. core/optimizer/__init__.py:12-35, core/optimizer/distrib_optimizer.py:20-35. On a GPU
    as well.
    """
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    from archscale_megatron.fused_adam import FusedAdam

    if not optimizer.USING_PYTORCH_OPTIMIZER:
        return
    optimizer.Adam = distrib_optimizer.Adam = FusedAdam
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True


def _fp32_parameters_first() -> None:
    """In a parameter group with fp32 and bf16 parameters, the distributed optimizer numbers them as they come, but then
    puts the fp32 ones first: it saves and loads the state of others. Mamba-1 has such groups (A_log, D, dt_proj.bias).

    core/optimizer/distrib_optimizer.py:300 (`_build_optimizer_group_ranges`), against the order made in
    `_build_model_and_main_param_groups`. On a GPU as well.
    """
    import torch
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    original = DistributedOptimizer._build_optimizer_group_ranges.__func__

    def build(cls: type, param_groups: list[Any], gbuf_ranges: list[Any]) -> tuple[dict[Any, Any], list[Any]]:
        index, group_ranges = original(cls, param_groups, gbuf_ranges)
        for number, group in enumerate(group_ranges):
            group["params"].sort(key=lambda parameter: parameter.dtype != torch.float32)
            index.update({parameter: (number, order) for order, parameter in enumerate(group["params"])})
        return index, group_ranges

    DistributedOptimizer._build_optimizer_group_ranges = classmethod(build)


def _fp32_parameters_of_half_precision_optimizers() -> None:
    """Without the distributed optimizer, and with Muon, the sharded state of bf16 parameters is found by counting
    them, although the optimizer has numbered fp32 ones as well: it is that of others, or an error. Mamba has such
    parameters (A_log, D, dt_proj.bias).

    core/optimizer/optimizer.py:1138 (`Float16OptimizerWithFloat16Params.sharded_state_dict`) and :1191
    (`load_state_dict`): while these run, every parameter counts as one with an fp32 copy, an fp32 parameter as its own
    copy. On a GPU as well.
    """
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params as HalfPrecisionOptimizer

    def with_all_parameters(method: Any) -> Any:
        def run(self: Any, *args: Any, **kwargs: Any) -> Any:
            halves, copies = self.float16_groups, self.fp32_from_float16_groups
            half = {id(c): h for hs, cs in zip(halves, copies, strict=True) for h, c in zip(hs, cs, strict=True)}
            self.fp32_from_float16_groups = [list(group["params"]) for group in self.optimizer.param_groups]
            self.float16_groups = [[half.get(id(p), p) for p in ps] for ps in self.fp32_from_float16_groups]
            try:
                return method(self, *args, **kwargs)
            finally:
                self.float16_groups, self.fp32_from_float16_groups = halves, copies

        return run

    for name in ("sharded_state_dict", "load_state_dict"):
        setattr(HalfPrecisionOptimizer, name, with_all_parameters(getattr(HalfPrecisionOptimizer, name)))


def _muon_by_parameter_class() -> None:
    """Megatron gives Muon what is 2-D and neither embedding nor output layer: A_log of Mamba-1 among it. And it has no
    MuonH.

    core/optimizer/emerging_optimizers.py:152 (`_EMERGING_OPTIMIZERS`, which is there to be added to), and
    core/optimizer/layer_wise_optimizer.py:74 (`tag_params_for_buffer_routing`, used at training/training.py:1642), by
    which the layer-wise distributed optimizer keeps a matrix whole. On a GPU as well.
    """
    from megatron.core.optimizer.emerging_optimizers import _EMERGING_OPTIMIZERS
    from megatron.training import get_args, training

    from archscale_megatron.optimizers.routing import entries, optimizer_of

    def tag_params_for_buffer_routing(model_chunks: list[Any]) -> None:
        for chunk in model_chunks:
            for name, parameter in chunk.named_parameters():
                whole = optimizer_of(name, parameter, get_args().optimizer) != "adam"
                parameter.is_managed_by_layer_wise_optimizer = whole

    _EMERGING_OPTIMIZERS.update(entries())
    training.tag_params_for_buffer_routing = tag_params_for_buffer_routing


def _names_of_optimizers() -> None:
    """`--optimizer` takes the names that there are here.

    training/arguments.py:45 (`add_megatron_arguments`). Not in our own group of arguments, because Megatron parses the
    command line again, without that group, in training/inprocess_restart.py:133. On a GPU as well.
    """
    from megatron.training import arguments

    from archscale_megatron.optimizers.arguments import OPTIMIZERS

    original = arguments.add_megatron_arguments

    def add_megatron_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = original(parser)
        option = next(action for action in parser._actions if action.dest == "optimizer")
        option.choices = OPTIMIZERS
        option.help = "of matrices, muonh also of the output layer; all else has AdamW (adam)"
        return parser

    arguments.add_megatron_arguments = add_megatron_arguments


def _synchronous_save_without_manager() -> None:
    """A synchronous save writes in the calling process, but starts a multiprocessing manager for the result:
    2 s with 1 rank and 11 s with 8, on 2 cores.

    core/dist_checkpointing/strategies/torch.py:725 (`save`) and filesystem_async.py:53
    (`get_write_results_queue`, called at :200). On a GPU as well. An asynchronous save keeps the manager.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    original_save = TorchDistSaveShardedStrategy.save

    def save(self: TorchDistSaveShardedStrategy, sharded_state_dict: dict[str, Any], checkpoint_dir: Path) -> None:
        manager_queue = filesystem_async.get_write_results_queue
        filesystem_async.get_write_results_queue = lambda mp_mode="spawn": queue.Queue()
        try:
            original_save(self, sharded_state_dict, checkpoint_dir)
        finally:
            filesystem_async.get_write_results_queue = manager_queue

    TorchDistSaveShardedStrategy.save = save


def _optimizer_groups() -> None:
    """`pretrain` builds the optimizer's parameter groups itself and takes none from its caller.

    training/training.py:1962 (`get_megatron_optimizer_config`), used at :2117. On a GPU as well.
    """
    from megatron.training import training

    from archscale_megatron.mup.overrides import optimizer_overrides

    original = training.get_megatron_optimizer_config

    def get_megatron_optimizer_config(args: Any) -> tuple[Any, dict[Any, Any]]:
        config, _ = original(args)
        return config, optimizer_overrides(args.parametrization, config)

    training.get_megatron_optimizer_config = get_megatron_optimizer_config


def _layer_symbols() -> None:
    """Layer patterns may hold our symbols besides Megatron's.

    core/models/hybrid/hybrid_layer_allocation.py:24 (`Symbols.VALID_LAYERS`). On a GPU as well.
    """
    from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols

    from archscale_megatron.archs.architecture import SYMBOLS

    Symbols.VALID_LAYERS |= set(SYMBOLS)


def _shared_state_between_stages() -> None:
    """The schedules make their own point-to-point communicator, for hidden states alone. `pretrain` would
    take ours, but wants it before there are process groups to make it from.

    core/pipeline_parallel/schedules.py:1025 and :2169 (`P2PCommunicator`). On a GPU as well.
    """
    from megatron.core.pipeline_parallel import schedules

    from archscale_megatron.model.pipeline import SharedStateCommunicator

    schedules.P2PCommunicator = SharedStateCommunicator


def _throughput_of_hybrid_models() -> None:
    """Megatron counts the FLOPs of its own layers, and does not log tokens per second.

    training/training.py:390 (`num_floating_point_operations`) and :2568 (`training_log`). On a GPU as well.
    """
    from megatron.training import training

    from archscale_megatron.training import throughput

    original_log = training.training_log

    def training_log(*args: Any, is_first_iteration: bool = False, **kwargs: Any) -> Any:
        iteration = args[3]
        throughput.log_tokens_per_second(iteration, is_first_iteration)
        return original_log(*args, is_first_iteration=is_first_iteration, **kwargs)

    training.num_floating_point_operations = throughput.model_flops
    training.training_log = training_log
