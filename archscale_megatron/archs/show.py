"""An architecture as numbers: a dictionary for programs, and a page of text for people."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from archscale_megatron.archs.architecture import (
    ATTENTION,
    CROSS_ATTENTION,
    GMU,
    SYMBOLS,
    WINDOW_ATTENTION,
    Architecture,
    Options,
)
from archscale_megatron.archs.counts import layer_flops, layer_parameters, non_embedding_parameters, training_flops
from archscale_megatron.archs.inference import cache_bytes_per_token, state_bytes
from archscale_megatron.archs.splits import boundary_bytes, imbalance, split_by_compute

STAGES = (2, 4, 8)
SHARED = {"memory": "memory", "kv": "keys, values"}
READS = {GMU: "memory", CROSS_ATTENTION: "kv"}


def name_of(symbol: str) -> str:
    """What a symbol stands for, in two or three words."""
    return SYMBOLS[symbol].partition(":")[0]


def window_of(arch: Architecture, symbol: str) -> int | None:
    """Tokens that a layer attends to at most; None for all, and for layers without attention."""
    if symbol not in ATTENTION:
        return None
    return arch.window if symbol == WINDOW_ATTENTION else arch.full_window


def describe(arch: Architecture, sequence_length: int) -> dict[str, Any]:
    """All that `show` tells, as JSON can hold it.

    `layers` has one entry an ArchScale layer: `writes` and `reads` name what it, mixer or MLP, writes into and reads
    from the shared state; `parameters` are those of both with their norms, `flops_per_token` their forward FLOPs.
    The model's `flops_per_token` are those of training, at `sequence_length`. `pipeline_splits` give the pattern of
    each, the most expensive stage over the mean one, and the bytes a token that cross each boundary in bf16.
    """
    non_embedding, embedding = non_embedding_parameters(arch), arch.vocab_size * arch.hidden_size
    splits = {n: split_by_compute(arch, n, sequence_length) for n in STAGES if n <= len(arch.pattern)}
    return {
        "family": arch.family,
        "depth": arch.depth,
        "pattern": arch.pattern,
        "hidden_size": arch.hidden_size,
        "ffn_hidden_size": arch.ffn_hidden_size,
        "num_attention_heads": arch.num_attention_heads,
        "num_query_groups": arch.num_query_groups,
        "head_dim": arch.head_dim,
        "rotary_base": arch.rotary_base,
        "vocab_size": arch.vocab_size,
        "options": {field.name: getattr(arch, field.name) for field in dataclasses.fields(Options)},
        "layers": [_layer(arch, index, sequence_length) for index in range(arch.depth)],
        "parameters": {
            "total_tied": non_embedding + embedding,
            "total_untied": non_embedding + 2 * embedding,
            "non_embedding": non_embedding,
            "embedding": embedding,
        },
        "sequence_length": sequence_length,
        "flops_per_token": round(training_flops(arch, sequence_length)),
        "cache_bytes_per_token": cache_bytes_per_token(arch),
        "state_bytes": state_bytes(arch),
        "tensor_parallel_sizes": arch.tensor_parallel_sizes(),
        "pipeline_splits": [
            {
                "stages": stages,
                "pattern": pattern,
                "imbalance": round(imbalance(arch, pattern, sequence_length), 4),
                "boundary_bytes_per_token": boundary_bytes(arch, pattern),
            }
            for stages, pattern in splits.items()
        ],
    }


def _layer(arch: Architecture, index: int, sequence_length: int) -> dict[str, Any]:
    mixer, mlp = arch.pattern[2 * index], arch.pattern[2 * index + 1]
    return {
        "index": index,
        "mixer": name_of(mixer),
        "window": window_of(arch, mixer),
        "mlp": name_of(mlp),
        "writes": [*arch.writes(2 * index), *arch.writes(2 * index + 1)],
        "reads": [READS[mixer]] if mixer in READS else [],
        "parameters": layer_parameters(arch, mixer) + layer_parameters(arch, mlp),
        "flops_per_token": round(sum(layer_flops(arch, symbol, sequence_length) for symbol in (mixer, mlp))),
    }


def page(arch: Architecture, sequence_length: int) -> str:
    """What `describe` says, to be read."""
    facts = describe(arch, sequence_length)
    parameters = facts["parameters"]
    mlp = f"MLP {arch.ffn_hidden_size:,}"
    if arch.top_k:
        shared = " and a shared one" if arch.shared_expert else ""
        mlp = f"{arch.experts_per_token} of {arch.num_experts} experts{shared}, each {arch.expert_ffn_size:,}"
    kept = "tied" if arch.tied_embeddings else "untied"
    positions = "no position embeddings" if arch.rotary_base is None else f"RoPE with base {arch.rotary_base:,}"
    numbers = [
        ("parameters", f"{parameters[f'total_{kept}']:,}", f"with {kept} embeddings"),
        ("", f"{parameters['non_embedding']:,}", "without embeddings"),
        ("", f"{parameters['embedding']:,}", f"in an embedding of {arch.vocab_size:,} rows"),
        ("training", f"{facts['flops_per_token']:,}", f"FLOPs per token, in sequences of {sequence_length:,}"),
        ("inference", f"{facts['cache_bytes_per_token']:,}", "bytes of cache per token"),
        ("", f"{facts['state_bytes']:,}", "bytes of constant state per sequence"),
    ]
    splits = [
        (
            split["stages"],
            split["pattern"],
            f"{split['imbalance']:.3f}",
            "  ".join(f"{n:,}" for n in split["boundary_bytes_per_token"]),
        )
        for split in facts["pipeline_splits"]
    ]
    return "\n".join(
        [
            f"{arch.family}, depth {arch.depth}: {arch.pattern}",
            f"hidden size {arch.hidden_size:,}; {mlp}; {arch.num_attention_heads} heads and {arch.num_query_groups} "
            f"key-value heads of {arch.head_dim}; {positions}",
            *_options(arch),
            "",
            *_aligned(
                [("layers", "", "mixer", "window", "writes", "reads", "with MLP"), *_rows(arch, facts)], "<<<><<>"
            ),
            "",
            *_aligned(numbers, "<><"),
            "",
            f"tensor parallel sizes: {', '.join(map(str, facts['tensor_parallel_sizes']))}",
            "",
            *_aligned([("pipeline", "pattern", "largest/mean", "bytes a token across each boundary"), *splits], "<<><"),
        ]
    )


def _options(arch: Architecture) -> list[str]:
    """The options that are not the usual ones."""
    given = []
    for field in dataclasses.fields(Options):
        value = getattr(arch, field.name)
        if value != field.default and field.name != "memory_source":
            name = field.name.replace("_", " ")
            given.append(name if value is True else f"{name} {value}")
    return ["with " + ", ".join(given)] if given else []


def _rows(arch: Architecture, facts: dict[str, Any]) -> list[Sequence[Any]]:
    """The layers, bottom first; a run of layers that repeats is written once, with the number of repetitions."""
    rows: list[Sequence[Any]] = []
    writers = {name: layer for layer in range(len(arch.pattern)) for name in arch.writes(layer)}
    layers = facts["layers"]
    alike = [{k: v for k, v in layer.items() if k != "index"} for layer in layers]
    start = 0
    while start < len(layers):
        period, times = _repetition(alike[start:])
        end = start + period * times
        for offset, layer in enumerate(layers[start : start + period]):
            mixer = arch.pattern[2 * layer["index"]]
            window = (layer["window"] or "all") if mixer in ATTENTION else ""
            writes = "; ".join(
                SHARED[name] + (" (its MLP)" if writers[name] == 2 * layer["index"] + 1 else "")
                for name in layer["writes"]
            )
            reads = "; ".join(f"{SHARED[name]} of {writers[name] // 2}" for name in layer["reads"])
            run = "" if offset else f"{start}" if end == start + 1 else f"{start} to {end - 1}"
            repeated = f"{times} x" if times > 1 and not offset else ""
            rows.append((run, repeated, layer["mixer"], window, writes, reads, f"{layer['parameters']:,}"))
        start = end
    return rows


def _repetition(items: Sequence[Any]) -> tuple[int, int]:
    """Length and number of the repetitions that `items` begins with: those that cover most, of the shortest kind."""
    best = (1, 1)
    for period in range(1, len(items) // 2 + 1):
        times = 1
        while items[times * period : (times + 1) * period] == items[:period]:
            times += 1
        if times > 1 and period * times > best[0] * best[1]:
            best = (period, times)
    return best


def _aligned(rows: Sequence[Sequence[Any]], alignment: str) -> list[str]:
    """Lines with columns two spaces apart, each to the left (<) or to the right (>)."""
    widths = [max(len(str(row[column])) for row in rows) for column in range(len(alignment))]
    lines = [
        "  ".join(f"{cell!s:{side}{width}}" for cell, side, width in zip(row, alignment, widths, strict=True))
        for row in rows
    ]
    return [line.rstrip() for line in lines]
