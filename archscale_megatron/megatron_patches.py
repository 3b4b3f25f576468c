"""Every patch of Megatron, in one place. Read against megatron-core 0.19.2.

An entry script calls `apply()` after `cpu.install()` and before it builds anything.
`tests/test_megatron_patches.py` holds a hash of each patched function: a new release of Megatron fails there,
and names the patch to read again.
"""

import argparse
import contextlib
import queue
import sys
import types
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
        _sizes_of_an_all_to_all()
    _skip_compiled_helpers()
    _adam_without_fused_libraries()
    _weight_gradients_without_apex()
    _norms_and_copies_in_one_kernel()
    _fp32_parameters_first()
    _fp32_parameters_of_half_precision_optimizers()
    _muon_by_parameter_class()
    _names_of_optimizers()
    _synchronous_save_without_manager()
    _optimizer_state_without_gathering()
    _save_without_copies()
    _asynchronous_save_of_a_snapshot()
    _checkpoint_worker_outlives_sigterm()
    _optimizer_groups()
    _not_a_number_in_the_first_iteration()
    _random_states_of_reruns()
    _layer_symbols()
    _shared_state_between_stages()
    _throughput_of_hybrid_models()
    _tasks_beside_validation()
    _checkpoints_with_digests()
    _saves_end_on_all_ranks()
    _load_newest_whole_checkpoint()
    _no_code_in_checkpoints()
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


def _weight_gradients_without_apex() -> None:
    """`--gradient-accumulation-fusion` needs an extension of Apex's, for which torch has the matrix product.

    core/tensor_parallel/layers.py:49 (imported by name there, and again in core/utils.py:1248); whether it is used is
    decided in training/megatron_options.py. On a GPU as well.
    """
    from megatron.core.tensor_parallel import layers

    from archscale_megatron.ops import weight_gradient

    if layers._grad_accum_fusion_available:
        return
    sys.modules["fused_weight_gradient_mlp_cuda"] = layers.fused_weight_gradient_mlp_cuda = weight_gradient
    layers._grad_accum_fusion_available = True


def _norms_and_copies_in_one_kernel() -> None:
    """Without Transformer Engine and Apex, the norm of the gradients waits for the GPU once a parameter, and scaling
    and copying are two kernels a parameter and a copy between them.

    core/utils.py:1325 (`local_multi_tensor_l2_norm`) and :1337 (`local_multi_tensor_scale`), held by name in
    core/optimizer/clip_grads.py:45 and core/optimizer/optimizer.py:38. On a GPU as well.
    """
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads, optimizer

    from archscale_megatron.optimizers import tensor_lists

    if clip_grads.l2_norm_impl is not utils.local_multi_tensor_l2_norm:
        return
    clip_grads.l2_norm_impl = tensor_lists.l2_norm
    clip_grads.multi_tensor_scale_impl = optimizer.multi_tensor_scale_impl = tensor_lists.scale


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


def _optimizer_state_without_gathering() -> None:
    """A fully reshardable save gathers the whole optimizer state on every data-parallel rank, through five copies of
    it, and a load reads all of it on every rank: most of the time of both. And gathering takes the padding of buckets
    out, but counts it where it looks for a parameter: behind padding, the state of others is saved.

    core/optimizer/distrib_optimizer.py:1262 (`get_parameter_state_dp_zero`) and :1690
    (`sharded_param_state_fully_reshardable`, which forgets the padding at :1790, and is followed at :1569 by a
    collection of the garbage that gathering leaves), :1193 (`_set_main_param_and_optimizer_states`, which would copy
    what is loaded in place onto itself). On a GPU as well.
    """
    from megatron.core.optimizer import distrib_optimizer

    from archscale_megatron.checkpoint.optimizer_state import sharded_state

    def sharded_param_state(
        self: Any, model_sharded_state_dict: dict[str, Any], is_loading: bool = False, metadata: Any = None
    ) -> dict[int, Any]:
        return sharded_state(self, model_sharded_state_dict, is_loading)

    set_states = distrib_optimizer.DistributedOptimizer._set_main_param_and_optimizer_states

    def set_main_param_and_optimizer_states(self: Any, parameter: Any, tensors: dict[str, Any]) -> None:
        own = self._get_main_param_and_optimizer_states(parameter)
        loaded_to_its_place = {k: k in own and t.data_ptr() == own[k].data_ptr() for k, t in tensors.items()}
        # What is no tensor is left as it is.
        set_states(self, parameter, {k: None if loaded_to_its_place[k] else t for k, t in tensors.items()})

    distrib_optimizer.DistributedOptimizer._set_main_param_and_optimizer_states = set_main_param_and_optimizer_states
    distrib_optimizer.DistributedOptimizer.sharded_param_state_fully_reshardable = sharded_param_state
    distrib_optimizer.gc = argparse.Namespace(collect=lambda: 0)


def _save_without_copies() -> None:
    """A tensor on the CPU that is part of another, as all parameters are of their buffer, is copied to be saved.

    core/dist_checkpointing/strategies/filesystem_async.py:146 (`_clone_or_dequantize_if_needed`), which leaves alone
    what has a storage of its own. On a GPU as well.
    """
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    from archscale_megatron.checkpoint.snapshot import with_own_storage

    prepare = FileSystemWriterAsync.prepare_write_data

    def prepare_write_data(self: FileSystemWriterAsync, plan: Any, planner: Any) -> None:
        resolve = planner.resolve_data

        def resolve_data(item: Any) -> Any:
            data = resolve(item)
            return with_own_storage(data) if getattr(data, "is_cpu", False) else data

        planner.resolve_data = resolve_data
        prepare(self, plan, planner)

    FileSystemWriterAsync.prepare_write_data = prepare_write_data


def _asynchronous_save_of_a_snapshot() -> None:
    """An asynchronous save shares tensors on the CPU with the process that writes them, while training changes them:
    the checkpoint mixes iterations.

    core/dist_checkpointing/strategies/async_utils.py:644 (`AsyncCallsQueue.schedule_async_request`), which hands them
    to the worker. On a GPU as well.
    """
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

    from archscale_megatron.checkpoint import snapshot

    schedule = AsyncCallsQueue.schedule_async_request

    def schedule_async_request(self: AsyncCallsQueue, async_request: Any) -> int:
        return schedule(self, snapshot.take(async_request))

    AsyncCallsQueue.schedule_async_request = schedule_async_request


def _checkpoint_worker_outlives_sigterm() -> None:
    """SIGTERM to all processes of a job, which is how torchrun and schedulers end it, ends the processes that write a
    checkpoint as well, and the ranks wait for them for ever. Where a rank is killed, they stay for ever.

    core/dist_checkpointing/strategies/async_utils.py:349 (`PersistentAsyncCaller`) and filesystem_async.py:53
    (`get_write_results_queue`). On a GPU as well.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    from archscale_megatron.checkpoint import worker

    PersistentAsyncCaller._get_process = staticmethod(worker.start)
    PersistentAsyncCaller.async_loop = staticmethod(worker.async_loop)
    PersistentAsyncCaller.schedule_async_call = worker.schedule_async_call
    PersistentAsyncCaller.is_current_async_call_done = worker.is_current_async_call_done
    filesystem_async.get_write_results_queue = worker.get_write_results_queue


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


def _not_a_number_in_the_first_iteration() -> None:
    """The rerun state machine lets every result of a launch's first iteration pass, because it could not save a
    checkpoint to rerun it from. A NaN is then in all weights, and in the checkpoint that it saves an iteration later.

    core/rerun_state_machine.py:464 (`RerunStateMachine.validate_result`); raises RuntimeError, as without reruns
    (`--rerun-mode disabled`). On a GPU as well.
    """
    from megatron.core.rerun_state_machine import RerunMode, RerunState, RerunStateMachine

    validate = RerunStateMachine.validate_result

    def validate_result(self: Any, result: Any, rejection_func: Any, message: str, *args: Any, **kwargs: Any) -> None:
        first = self.state == RerunState.INITIAL_RUN and not self.first_iteration_complete
        fatal = args[2] if len(args) > 2 else kwargs.get("fatal", True)
        if self.mode == RerunMode.VALIDATE_RESULTS and first and fatal and rejection_func(result):
            raise RuntimeError(
                f"{message}: {result}, in iteration {self.current_iteration}, the first of this launch, which is "
                "not run again to see whether the device is at fault; nothing is saved"
            )
        validate(self, result, rejection_func, message, *args, **kwargs)

    RerunStateMachine.validate_result = validate_result


def _random_states_of_reruns() -> None:
    """The random states that an iteration began with are restored for its rerun, and again for the checkpoint after
    it; but the rerun's dropout has moved them on, because it works on the very dict. That checkpoint then goes on
    with other masks, and a rerun from it compares with another loss.

    core/tensor_parallel/random.py:279 (`CudaRNGStatesTracker.set_states`), as training/initialize.py:80
    (`state_restore_func`) calls it. On a GPU as well.
    """
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    original = CudaRNGStatesTracker.set_states
    CudaRNGStatesTracker.set_states = lambda self, states: original(self, dict(states))


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
    """Megatron counts the FLOPs of its own layers, and logs neither tokens per second nor spikes.

    training/training.py:390 (`num_floating_point_operations`) and :2568 (`training_log`). On a GPU as well.
    """
    from megatron.training import training

    from archscale_megatron.training import spikes, throughput

    original_log = training.training_log

    def training_log(*args: Any, is_first_iteration: bool = False, **kwargs: Any) -> Any:
        losses, iteration, gradient_norm = args[0], args[3], args[7]
        throughput.log_tokens_per_second(iteration, is_first_iteration)
        spikes.note_spikes(losses, gradient_norm, iteration)
        return original_log(*args, is_first_iteration=is_first_iteration, **kwargs)

    training.num_floating_point_operations = throughput.model_flops
    training.training_log = training_log


def _tasks_beside_validation() -> None:
    """Megatron's validation knows the loss alone, and `pretrain` takes nothing else that it would call there.

    training/training.py:4342 (`evaluate_and_print_results`), called at :4040 after every `--eval-interval` and at :1483
    and :1494 behind the last iteration; where parameters are gathered while others compute, that is off then (:4010,
    :4114). On a GPU as well.
    """
    from megatron.training import training

    from archscale_megatron.training import eval_tasks

    original = training.evaluate_and_print_results

    def evaluate_and_print_results(
        prefix: str, forward_step_func: Any, data_iterator: Any, model: Any, iteration: int, *args: Any, **kwargs: Any
    ) -> None:
        original(prefix, forward_step_func, data_iterator, model, iteration, *args, **kwargs)
        eval_tasks.score(model, iteration)

    training.evaluate_and_print_results = evaluate_and_print_results


def _checkpoints_with_digests() -> None:
    """A data file's digest is computed while it is written. And Megatron syncs a file whose last bytes are still in a
    buffer of Python's.

    core/dist_checkpointing/strategies/filesystem_async.py:416 (`open` in `write_preloaded_data`). On a GPU as well.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from archscale_megatron.checkpoint.writing import DigestingFile

    filesystem_async.open = DigestingFile


def _saves_end_on_all_ranks() -> None:
    """An error of rank 0's small files, or of a rank's directory, leaves the other ranks waiting; an error of a save
    ends training; the tracker is overwritten in place; the files of an older attempt stay.

    training/checkpointing.py:549 (`save_checkpoint`). The manifest and the tracker are written by `saving.finish`,
    between `dist_checkpointing.save` and what follows at :1003. core/dist_checkpointing/serialization.py:363 (`save`)
    and strategies/filesystem_async.py:248, :378, :504 and :534 (the writer). On a GPU as well.
    """
    import io

    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import serialization
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
    from megatron.training import checkpointing, get_args, training

    from archscale_megatron.checkpoint import saving, writing

    original_save, original_checkpoint = dist_checkpointing.save, checkpointing.save_checkpoint
    original_plan, original_finish = FileSystemWriterAsync.prepare_local_plan, FileSystemWriterAsync.finish
    original_config, original_finalize = serialization.save_config, training.maybe_finalize_async_save
    files = checkpointing.maybe_msc

    class Files:
        """Megatron's, except that the tracker is moved already when Megatron writes it."""

        def __getattr__(self, name: str) -> Any:
            return getattr(files, name)

        def open(self, path: str, mode: str = "r") -> Any:
            return io.StringIO() if mode == "w" else files.open(path, mode)

    def prepare_local_plan(self: FileSystemWriterAsync, plan: Any) -> Any:
        with contextlib.suppress(OSError):  # then the data cannot be written either, of which all ranks learn
            original_plan(self, plan)
        return plan

    def finish(self: FileSystemWriterAsync, metadata: Any, results: Any) -> None:
        with saving.held():
            original_finish(self, metadata, results)

    def save_config(config: Any, checkpoint_dir: str) -> None:
        with saving.held():
            original_config(config, checkpoint_dir)

    def save(*args: Any, **kwargs: Any) -> Any:
        request = original_save(*args, **kwargs)
        if request is not None:
            request.add_finalize_fn(saving.finish)
        else:
            saving.finish()
        return request

    def save_checkpoint(iteration: int, *args: Any, **kwargs: Any) -> None:
        loaded = checkpointing.get_loaded_iteration()
        saving.save(get_args(), iteration, loaded, lambda: original_checkpoint(iteration, *args, **kwargs))

    def maybe_finalize_async_save(*args: Any, **kwargs: Any) -> None:
        saving.finalize(lambda: original_finalize(*args, **kwargs))

    checkpointing.maybe_msc = Files()
    FileSystemWriterAsync.prepare_local_plan, FileSystemWriterAsync.finish = prepare_local_plan, finish
    FileSystemWriterAsync.write_preloaded_data = staticmethod(writing.write_preloaded_data)
    FileSystemWriterAsync.write_preloaded_data_multithread = staticmethod(writing.write_preloaded_data_multithread)
    serialization.save_config = save_config
    checkpointing.dist_checkpointing = _with(dist_checkpointing, save=save)
    checkpointing.save_checkpoint = training.save_checkpoint = save_checkpoint
    training.maybe_finalize_async_save = maybe_finalize_async_save


def _load_newest_whole_checkpoint() -> None:
    """Megatron loads what the tracker says, whole or not; a tracker that cannot be read ends it with exit code 0; and a
    tracker that says `release` wins against `--ckpt-step`.

    training/checkpointing.py:353 (`read_metadata`) and :2066 (`load_checkpoint`, used at training/training.py:2199). On
    a GPU as well.
    """
    from megatron.training import checkpointing, get_args, training

    from archscale_megatron.checkpoint import resume

    original_read, original_load = checkpointing.read_metadata, training.load_checkpoint

    def read_metadata(tracker_filename: str) -> tuple[int, bool]:
        chosen = get_args().ckpt_step
        return (chosen, False) if chosen is not None else original_read(tracker_filename)

    def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
        with resume.ending_on_errors():
            resume.choose(get_args())
            return original_load(*args, **kwargs)

    checkpointing.read_metadata, training.load_checkpoint = read_metadata, load_checkpoint


def _no_code_in_checkpoints() -> None:
    """A checkpoint's `.metadata` is read with `pickle.load`, and the objects in its data with `weights_only=False`: who
    writes a checkpoint runs code where it is loaded.

    torch/distributed/checkpoint/filesystem.py:926 (`FileSystemReader.read_metadata`), default_planner.py:382
    (`DefaultLoadPlanner.load_bytes`), and `load`, which hides their errors in its own; used in
    core/dist_checkpointing/strategies/torch.py:493 and core/dist_checkpointing/serialization.py:225. On a GPU as well.
    """
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint import CheckpointException, FileSystemReader
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, set_element
    from torch.distributed.checkpoint.metadata import StorageMeta

    from archscale_megatron.checkpoint import CheckpointError, safe_pickle

    original_load = checkpoint.load

    def read_metadata(self: FileSystemReader, *args: Any, **kwargs: Any) -> Any:
        try:
            metadata = safe_pickle.read_metadata(Path(self.path))
        except CheckpointError as error:
            self.refused = error  # type: ignore[attr-defined]
            raise
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def load_bytes(self: DefaultLoadPlanner, read_item: Any, value: Any) -> None:
        name = read_item.dest_index.fqn
        loaded = safe_pickle.load_object(value, name)
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[name], loaded)
        else:
            self.state_dict[name] = loaded

    def load(*args: Any, **kwargs: Any) -> Any:
        try:
            return original_load(*args, **kwargs)
        except CheckpointException as error:  # torch's, of the errors of all ranks
            refused = getattr(kwargs.get("storage_reader"), "refused", None)
            causes = [refused, *(cause for cause, _ in error.failures.values())]
            raise next((cause for cause in causes if isinstance(cause, CheckpointError)), error) from None

    checkpoint.load = load
    FileSystemReader.read_metadata = read_metadata  # type: ignore[method-assign]
    DefaultLoadPlanner.load_bytes = load_bytes  # type: ignore[method-assign]


def _with(module: Any, **names: Any) -> Any:
    """A copy of `module` in which `names` are others, for one module that uses it."""
    copy = types.ModuleType(module.__name__)
    copy.__dict__.update(vars(module) | names)
    return copy
