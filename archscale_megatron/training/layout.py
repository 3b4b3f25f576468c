"""The parallel layout: what a model can be split into, and where its pattern is cut."""

from __future__ import annotations

import argparse

from archscale_megatron.archs.architecture import PIPE, Architecture
from archscale_megatron.archs.splits import split_by_compute


def check_layout(args: argparse.Namespace, arch: Architecture) -> None:
    """Raises ValueError, with the legal sizes, if the model, the processes or the batch cannot be divided so."""
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    legal = arch.tensor_parallel_sizes()
    if tp not in legal:
        whole = " and ".join(f"{n:,} {name}" for name, n in arch.split_over_ranks().items() if n % tp)
        raise ValueError(
            f"--tensor-model-parallel-size {tp}: {arch.family} at depth {arch.depth} has {whole} "
            f"to split; use {', '.join(map(str, legal))}"
        )
    if args.world_size % (tp * pp):
        raise ValueError(
            f"{args.world_size} processes cannot be divided into tensor x pipeline parallel groups of {tp} x {pp}; "
            f"start a multiple of {tp * pp}"
        )
    if args.sequence_parallel and args.seq_length % tp:
        raise ValueError(
            f"--seq-length {args.seq_length} with --sequence-parallel: must be a multiple of "
            f"--tensor-model-parallel-size {tp}"
        )
    step = args.micro_batch_size * (args.world_size // (tp * pp))
    if args.global_batch_size is not None and args.global_batch_size % step:
        raise ValueError(
            f"--global-batch-size {args.global_batch_size}: must be a multiple of micro batch x data parallel size, "
            f"{args.micro_batch_size} x {step // args.micro_batch_size} = {step}"
        )


def layer_pattern(args: argparse.Namespace, arch: Architecture) -> str:
    """The pattern with its pipeline boundaries: the user's, or placed by compute.

    Raises:
        ValueError: the user's is another model's, or there are more stages than layers.
    """
    pp = args.pipeline_model_parallel_size
    given = args.hybrid_layer_pattern
    virtual, args.num_virtual_stages_per_pipeline_rank = args.num_virtual_stages_per_pipeline_rank or 1, None
    if given is not None:
        if given.replace(PIPE, "") != arch.pattern:
            raise ValueError(
                f"--hybrid-layer-pattern {given} is not {arch.family} at depth {arch.depth}, which is {arch.pattern}; "
                "it may only add pipeline boundaries, |"
            )
        segments = given.split(PIPE)
        if "" in segments or len(segments) % pp:
            raise ValueError(
                f"--hybrid-layer-pattern {given}: {len(segments)} segments; it needs a multiple of "
                f"--pipeline-model-parallel-size {pp}, none of them empty"
            )
        return given
    if virtual > 1 and pp == 1:
        raise ValueError(
            f"--num-virtual-stages-per-pipeline-rank {virtual}: needs --pipeline-model-parallel-size of 2 or more"
        )
    try:
        return split_by_compute(arch, pp * virtual, args.seq_length)
    except ValueError as error:
        raise ValueError(f"--pipeline-model-parallel-size {pp}: {error}") from None
