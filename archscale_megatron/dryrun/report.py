"""What a dry run found, for people and for machines."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from megatron.core.num_microbatches_calculator import get_num_microbatches

from archscale_megatron.archs.splits import segment_flops
from archscale_megatron.dryrun.bubble import bubble
from archscale_megatron.dryrun.stage import Stage

VOCABULARY_PARAMETERS = ("embedding.word_embeddings.weight", "output_layer.weight")
MEMORY = ("parameters", "gradients", "optimizer", "activations")
SENT = ("TP", "PP", "DP", "EP", "other")


def summary(args: argparse.Namespace, stages: list[Stage], kernels: str) -> dict[str, Any]:
    """Everything as plain data; memory and messages in bytes.

    `parameters` are the model's: a tied embedding once, without the rows that pad the vocabulary. What the ranks
    hold besides is `vocabulary_padding` (elements) and `tied_copies` (elements of a tied embedding's second copy).
    """
    whole: dict[str, int] = {}
    for stage in stages:
        whole |= stage.whole_parameters
    matrices = sum(name in whole for name in VOCABULARY_PARAMETERS)
    padding = matrices * (args.padded_vocab_size - args.architecture.vocab_size) * args.hidden_size
    microbatches = get_num_microbatches()
    equal, actual = bubbles(args, microbatches)
    return {
        "model": {"family": args.architecture.family, "depth": args.architecture.depth},
        "layout": {
            "ranks": args.world_size,
            "tensor_model_parallel_size": args.tensor_model_parallel_size,
            "pipeline_model_parallel_size": args.pipeline_model_parallel_size,
            "virtual_stages": args.virtual_pipeline_model_parallel_size or 1,
            "data_parallel_size": args.data_parallel_size,
            "micro_batches": microbatches,
            "tokens_per_step": args.global_batch_size * args.seq_length,
        },
        "kernels": kernels,
        "parameters": sum(whole.values()) - padding,
        "vocabulary_padding": padding,
        "tied_copies": sum(sum(stage.whole_parameters.values()) for stage in stages) - sum(whole.values()),
        "bubble": {"equal_stages": equal, "these_stages": actual},
        "stages": [
            {name: value for name, value in asdict(stage).items() if name != "whole_parameters"}
            | {"memory_total": sum(stage.memory.values())}
            for stage in stages
        ],
    }


def bubbles(args: argparse.Namespace, microbatches: int) -> tuple[float, float]:
    """The pipeline bubble if all stages took equally long, and with times in proportion to their FLOPs."""
    arch, pp = args.architecture, args.pipeline_model_parallel_size
    flops = segment_flops(arch, args.hybrid_layer_pattern, args.seq_length)
    schedule = pp, microbatches, args.microbatch_group_size_per_vp_stage
    return bubble([1.0] * len(flops), *schedule), bubble(flops, *schedule)


def table(found: dict[str, Any]) -> str:
    """The summary as text, one line a stage."""
    layout, model = found["layout"], found["model"]
    kinds = [kind for kind in SENT if any(stage["sent"].get(kind) for stage in found["stages"])] or ["TP"]
    header = ["stage", "rank", "parameters", *MEMORY, "total", *kinds, "layers"]
    header[header.index("parameters", 3)] = "weights"
    rows = [header]
    for number, stage in enumerate(found["stages"]):
        memory = [*(stage["memory"][name] for name in MEMORY), stage["memory_total"]]
        sent = [stage["sent"].get(kind, 0) for kind in kinds]
        gib = [f"{size / 2**30:.2f}" for size in [*memory, *sent]]
        rows.append([str(number), str(stage["rank"]), f"{stage['parameters']:,}", *gib, stage["layers"]])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([*(c.rjust(w) for c, w in zip(r[:-1], widths, strict=False)), r[-1]]) for r in rows]
    memory_starts = sum(w + 2 for w in widths[:3])
    sent_starts = memory_starts + sum(w + 2 for w in widths[3:8])
    above = " " * memory_starts + "memory of a rank, GiB"
    notes = []
    if found["vocabulary_padding"]:
        notes.append(f"{found['vocabulary_padding']:,} more pad the vocabulary")
    if found["tied_copies"]:
        notes.append(f"{found['tied_copies']:,} more are the last stage's copy of the tied embedding")
    bubble = found["bubble"]
    return "\n".join(
        [
            f"{model['family']}, depth {model['depth']}, on {layout['ranks']} GPUs: "
            f"tensor {layout['tensor_model_parallel_size']} x pipeline {layout['pipeline_model_parallel_size']}"
            + (f" ({layout['virtual_stages']} virtual)" if layout["virtual_stages"] > 1 else "")
            + f" x data {layout['data_parallel_size']}; "
            f"{layout['micro_batches']} micro-batches, {layout['tokens_per_step']:,} tokens a step",
            "",
            above.ljust(sent_starts) + "sent by a rank in a step, GiB",
            *lines,
            "",
            "; ".join([f"parameters over all model-parallel ranks: {found['parameters']:,}", *notes]),
            f"pipeline bubble: {bubble['equal_stages']:.1%} of the ideal time if stages were equal, "
            f"{bubble['these_stages']:.1%} with the FLOPs of these",
        ]
    )
