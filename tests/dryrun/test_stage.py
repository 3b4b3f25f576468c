"""Dry runs against what is known of a layout, and against training runs that are measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from archscale_megatron.archs.architecture import Architecture
from archscale_megatron.archs.build import build_architecture
from archscale_megatron.archs.counts import parameters
from archscale_megatron.archs.splits import payloads
from archscale_megatron.model.payload import packed_width
from tests.dryrun.runs import dry_runs
from tests.launch import torchrun
from tests.model.building import config_of

SEQUENCE, BATCH = 1024, 2  # tokens, and sequences in a micro-batch
COMMON = ["--seq-length", str(SEQUENCE), "--micro-batch-size", str(BATCH), "--bf16"]

# name: family, depth, what else of the architecture, options of the layout
FULL_SIZE: dict[str, tuple[str, int, dict[str, Any], list[str]]] = {
    "sambay_128_nodes": ("sambay", 32, {}, [
        "--nodes", "128", "--tensor-model-parallel-size", "2", "--sequence-parallel", "--pipeline-model-parallel-size",
        "4", "--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather", "--global-batch-size",
        "4096",
    ]),
    "untied_interleaved": ("transformer", 8, {"tied_embeddings": False}, [
        "--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2",
        "--num-virtual-stages-per-pipeline-rank", "2", "--use-distributed-optimizer", "--global-batch-size", "32",
    ]),
    "padded_vocabulary": ("samba", 8, {"vocab_size": 50257}, [
        "--pipeline-model-parallel-size", "8", "--global-batch-size", "16",
    ]),
    "phi4miniflash": ("phi4miniflash", 32, {}, [
        "--nodes", "128", "--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "4",
        "--use-distributed-optimizer", "--global-batch-size", "1024",
    ]),
    "one_rank": ("swayoco", 8, {"vocab_size": 100}, ["--gpus-per-node", "1", "--global-batch-size", "2"]),
    "data_parallel": ("mamba", 8, {}, ["--nodes", "2", "--global-batch-size", "64"]),
}  # fmt: skip


TINY = [
    "--depth", "8", "--aspect-ratio", "16", "--head-dim", "16", "--num-kv-heads", "2", "--local-window", "64",
    "--vocab-size", "512", "--seq-length", "256", "--micro-batch-size", "2", "--global-batch-size", "8", "--bf16",
]  # fmt: skip
MEASURED = {
    "pipeline": ["--train-model", "sambay", "--pipeline-model-parallel-size", "2", "--use-distributed-optimizer"],
    "interleaved_recompute": [
        "--train-model", "samba", "--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", "2",
        "--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1",
    ],
    "data": [
        "--train-model", "swayoco", "--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"
    ],
    "experts": [
        "--train-model", "sambay_gqa4_moe", "--sparsity", "2", "--top-k", "2", "--expert-model-parallel-size", "2",
        "--moe-token-dispatcher-type", "allgather",
    ],
    "tensor": ["--train-model", "sambay", "--tensor-model-parallel-size", "2", "--sequence-parallel"],
}  # fmt: skip


def options_of(name: str) -> list[str]:
    family, depth, overrides, layout = FULL_SIZE[name]
    words = ["--train-model", family, "--depth", str(depth), *COMMON, *layout]
    if "vocab_size" in overrides:
        words += ["--vocab-size", str(overrides["vocab_size"])]
    if not overrides.get("tied_embeddings", True):
        words.append("--untie-embeddings-and-output-weights")
    return words


def architecture_of(name: str) -> Architecture:
    family, depth, overrides, _ = FULL_SIZE[name]
    return build_architecture(family, depth, **overrides)


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, Any]]:
    cases = {name: options_of(name) for name in FULL_SIZE}
    cases |= {name: ["--gpus-per-node", "2", "--kernels", "torch", *TINY, *MEASURED[name]] for name in MEASURED}
    results = dict(zip(cases, dry_runs(list(cases.values())), strict=True))
    assert all(code == 0 for code, _ in results.values()), results
    return {name: result for name, (_, result) in results.items()}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_parameters_of_all_stages_are_the_architectures(found: dict[str, Any], name: str) -> None:
    result, arch = found[name], architecture_of(name)
    assert result["parameters"] == parameters(arch)
    rows = -arch.vocab_size % 64  # 64 is a multiple of all tensor-parallel sizes here
    assert result["vocabulary_padding"] == rows * arch.hidden_size * (1 if arch.tied_embeddings else 2)
    stages = result["stages"]
    copied = arch.tied_embeddings and len(stages) > 1
    assert result["tied_copies"] == copied * (arch.vocab_size + rows) * arch.hidden_size
    ranks = result["layout"]["ranks"]
    assert [stage["rank"] for stage in stages] == [i * ranks // len(stages) for i in range(len(stages))]


def test_parameters_of_phi4miniflash(found: dict[str, Any]) -> None:
    """3,340,399,104 of ArchScale's model besides the embedding, and 200,064 x 2,560 of that."""
    assert found["phi4miniflash"]["parameters"] == 3_852_562_944


@pytest.mark.parametrize("name", FULL_SIZE)
def test_resident_memory(found: dict[str, Any], name: str) -> None:
    """Weights in bf16, gradients in fp32; fp32 master weights and two moments, divided by the data-parallel ranks with
    the distributed optimizer. Mamba-1's few fp32 parameters (at most 4 % of a stage, and no master weights) and the
    buffers' padding are the tolerance."""
    data_parallel = found[name]["layout"]["data_parallel_size"]
    share = data_parallel if "--use-distributed-optimizer" in FULL_SIZE[name][3] else 1
    for stage in found[name]["stages"]:
        n, memory = stage["parameters"], stage["memory"]
        assert memory["parameters"] == pytest.approx(2 * n, rel=0.04)
        assert memory["gradients"] == pytest.approx(4 * n, rel=0.001)
        assert memory["optimizer"] == pytest.approx(12 * n / share, rel=0.02)
        assert stage["memory_total"] == sum(memory.values())


@pytest.mark.parametrize("name", FULL_SIZE)
def test_data_parallel_messages(found: dict[str, Any], name: str) -> None:
    """Rings: reduce-scatter of the gradients and all-gather of the weights, or all-reduce of the gradients."""
    n = found[name]["layout"]["data_parallel_size"]
    for stage in found[name]["stages"]:
        gradients, weights = stage["memory"]["gradients"], stage["memory"]["parameters"]
        moved = gradients + weights if "--use-distributed-optimizer" in FULL_SIZE[name][3] else 2 * gradients
        assert stage["sent"].get("DP", 0) == pytest.approx((n - 1) / n * moved, rel=1e-6)


@pytest.mark.parametrize("name", ["sambay_128_nodes", "padded_vocabulary"])
def test_pipeline_messages(found: dict[str, Any], name: str) -> None:
    """A stage sends its output forward and as much as its input backward, fp32 words of hidden channels and shared
    state; a tied embedding's fp32 gradient is summed over two stages."""
    stages, arch, layout = found[name]["stages"], architecture_of(name), found[name]["layout"]
    tp, sequence_parallel = layout["tensor_model_parallel_size"], "--sequence-parallel" in FULL_SIZE[name][3]
    config = config_of(
        arch, torch.bfloat16, tensor_model_parallel_size=tp, sequence_parallel=sequence_parallel and tp > 1
    )
    crossing = payloads(arch, "|".join(stage["layers"] for stage in stages))
    tokens = layout["micro_batches"] * BATCH * SEQUENCE // (tp if sequence_parallel else 1)
    boundaries = [4 * packed_width(arch, payload, config) * tokens for payload in crossing]
    embedding = 4 * (arch.vocab_size + -arch.vocab_size % 64) * arch.hidden_size // tp
    last = len(stages) - 1
    for number, stage in enumerate(stages):
        expected = sum(boundaries[max(0, number - 1) : number + 1]) + (embedding if number in (0, last) else 0)
        assert stage["sent"]["PP"] == expected


def test_tensor_parallel_messages(found: dict[str, Any]) -> None:
    """Without sequence parallelism: two all-reduces a layer and pass, of bf16 [s, b, h]; one of the embedding, and one
    of the output layer's input gradient; three fp32 numbers a token in the loss. Ids and mask are broadcast."""
    result, arch = found["untied_interleaved"], architecture_of("untied_interleaved")
    tokens = result["layout"]["micro_batches"] * BATCH * SEQUENCE
    width = 2 * arch.hidden_size * tokens
    for stage in result["stages"]:
        layers = len(stage["layers"].replace("|", ""))
        ends = width + 3 * 4 * tokens if stage is result["stages"][-1] else width
        assert stage["sent"]["TP"] == pytest.approx(2 * layers * width + ends, rel=0.01)


LAUNCHES = 3  # at most


@pytest.mark.parametrize("name", MEASURED)
def test_estimate_is_what_training_takes(found: dict[str, Any], name: str, tmp_path: Path) -> None:
    """Two steps of pretrain_archscale.py on two processes: its tensors are counted, and torch's allocator is asked,
    except under tensor and expert parallelism, where gloo allocates copies of what it sums. On a busy machine gloo
    also holds what it has sent for a while: then the allocator is asked again, of another launch.

    A few tensors of the first step are still there in the second; the dry run has them among the activations.
    """
    training = ["--mock-data", "--tokenizer-type", "NullTokenizer", "--lr", "1e-3", "--train-iters", "2",
                "--eval-iters", "0", "--num-workers", "0"]  # fmt: skip
    asked = name not in ("tensor", "experts")
    for _ in range(LAUNCHES):
        torchrun(2, "tests/dryrun/measured_pretrain.py", str(tmp_path), *TINY, *MEASURED[name], *training)
        launch = {s["rank"]: json.loads((tmp_path / f"{s['rank']}.json").read_text()) for s in found[name]["stages"]}
        allocated = {
            rank: sum(one["allocator"][k] for k in ("resident", "activations")) for rank, one in launch.items()
        }
        if not asked or all(s["memory_total"] > 0.9 * allocated[s["rank"]] for s in found[name]["stages"]):
            break
    for stage in found[name]["stages"]:
        measured = launch[stage["rank"]]
        tensors = measured["recorder"]
        assert stage["memory"]["activations"] == pytest.approx(tensors["activations"], rel=0.1)
        assert stage["memory_total"] == pytest.approx(tensors["resident"] + tensors["activations"], rel=0.03)
        if asked:
            assert stage["memory_total"] == pytest.approx(allocated[stage["rank"]], rel=0.1)
        if name != "data":  # where the optimizer's step sends too
            assert sum(stage["sent"].values()) == sum(measured["recorder"]["sent"].values())
